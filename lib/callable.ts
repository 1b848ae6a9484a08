// The base of class Pipeline: what makes an instance of a class a function.
// Runs on the JS thread.

/**
 * A class whose instances are functions: `super(target)` makes `this` the target, so that private
 * fields are installed on it.
 */
export class Callable {
  constructor(target: object) {
    // biome-ignore lint/correctness/noConstructorReturn: this is how an instance becomes callable
    return Object.setPrototypeOf(target, new.target.prototype);
  }
}
Object.setPrototypeOf(Callable.prototype, Function.prototype);
