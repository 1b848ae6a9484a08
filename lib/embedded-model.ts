// Where the model that comes with this package lies. Whether it is whole is for those who open it
// to find out.
import { join } from 'node:path';
import { packageRoot } from './native.js';

/** Folder of the model that comes with this package. */
export function embeddedModel(): string {
  return join(packageRoot(), 'models', 'tiny-internvl');
}
