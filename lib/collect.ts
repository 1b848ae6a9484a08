// The promise form of a call: waits for all its responses and puts them in the order of the
// prompts. Runs on the JS thread.
import type { Call } from './call.js';
import type { Completion, CompletionListener } from './completion.js';
import type { Response } from './response.js';

/** One response a prompt. That of several choices is the first that failed, or else the first. */
export function byPrompt(choices: readonly (readonly Response[])[]): Response[] {
  return choices.flatMap((answers) => {
    const first = answers.find(({ error }) => error !== undefined) ?? answers[0];
    if (first === undefined) return [];
    return [answers.length > 1 ? { ...first, choices: answers } : first];
  });
}

/** All responses of a call: those of each prompt in order. */
export function collect(call: Call): Promise<Response[][]> {
  return new Promise((resolve, reject) => {
    const responses: Response[][] = [];
    let numFinished = 0;
    let total: number | undefined;
    const settle = (): void => {
      if (numFinished === total) resolve(responses);
    };
    const listener: CompletionListener = {
      updated: () => undefined,
      finished: (completion: Completion) => {
        const { index, choice, response } = completion;
        const answers = responses[index] ?? [];
        responses[index] = answers;
        if (response !== undefined) answers[choice] = response;
        numFinished += 1;
        settle();
      },
      failed: reject,
    };
    call.start(listener).then(
      (count) => {
        total = count;
        settle();
      },
      (reason: unknown) => {
        call.abort();
        reject(reason);
      },
    );
  });
}
