// Memory of whole images. Fresh pages cost more than the resize that fills them, so large buffers
// ask the system for huge pages; where it has none to give, nothing changes.
#pragma once

#include <cstddef>

namespace turbomind::image {

// Asks for huge pages for memory that has not been touched yet. Only a hint.
void prefer_huge_pages(void* memory, size_t bytes);

}  // namespace turbomind::image
