// Memory for whole images. Fresh pages cost more than the resize that fills them, so large buffers
// ask the system for huge pages; where it has none to give, nothing changes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace turbomind::image {

// Uninitialised; may be released on any thread. Throws Error{out_of_memory}.
std::shared_ptr<uint8_t> allocate_pixels(size_t bytes);

// Asks for huge pages for memory that has not been touched yet. Only a hint.
void prefer_huge_pages(void* memory, size_t bytes);

}  // namespace turbomind::image
