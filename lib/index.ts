export { BackendNotFoundError, TurbomindError } from './errors.js';
