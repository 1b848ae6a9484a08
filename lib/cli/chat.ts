// `turbomind-node chat`: questions on stdin, streamed answers on stdout, with history. Ctrl-C ends
// an answer; at the prompt, twice leaves. Runs on the main thread.
import { createInterface, type Interface } from 'node:readline';
import type { ChatMessageInput, ContentPartInput } from '../messages.js';
import { pipeline } from '../open-pipeline.js';
import type { GenerationOptions } from '../options.js';
import type { Pipeline } from '../pipeline.js';
import { describeError, EXIT, log, progressBar } from './output.js';
import { type ModelFlags, toGenerationOptions, toPipelineOptions } from './settings.js';

const HELP = `/image PATH   show a picture with the next question
/clear        forget the conversation
/exit         leave (as do Ctrl-D, and Ctrl-C twice)`;

export async function chat(model: string | undefined, flags: ModelFlags): Promise<void> {
  const onProgress = progressBar('Loading');
  await using pipe = await pipeline(model, { ...toPipelineOptions(flags), onProgress });
  const session = new ChatSession(pipe, toGenerationOptions(flags), flags.system);
  await session.converse();
}

class ChatSession {
  readonly #pipe: Pipeline;
  readonly #options: GenerationOptions;
  readonly #opening: readonly ChatMessageInput[];
  readonly #lines: Interface;
  #history: ChatMessageInput[] = [];
  #pictures: string[] = [];
  #answering: AbortController | undefined;
  #wantsToLeave = false;

  constructor(pipe: Pipeline, options: GenerationOptions, system: string | undefined) {
    this.#pipe = pipe;
    this.#options = options;
    this.#opening = system === undefined ? [] : [{ role: 'system', content: system }];
    const { stdin, stdout, stderr } = process;
    const isTerminal = stdin.isTTY === true && stdout.isTTY === true;
    this.#lines = createInterface({
      input: stdin,
      output: stderr,
      terminal: isTerminal,
      prompt: '> ',
    });
    if (isTerminal) log(`${pipe.info.architecture} on ${pipe.info.device}. /help lists commands.`);
  }

  async converse(): Promise<void> {
    const interrupt = (): void => this.#interrupt();
    this.#lines.on('SIGINT', interrupt); // a terminal in raw mode
    process.on('SIGINT', interrupt); // a pipe, or kill -INT
    try {
      this.#ask();
      for await (const line of this.#lines) {
        if (!(await this.#handle(line.trim()))) break;
        this.#ask();
      }
    } finally {
      process.removeListener('SIGINT', interrupt);
      this.#lines.close();
    }
  }

  #ask(): void {
    if (process.stdin.isTTY === true) this.#lines.prompt();
  }

  #interrupt(): void {
    if (this.#answering !== undefined) {
      this.#answering.abort();
    } else if (this.#wantsToLeave) {
      process.exitCode = EXIT.interrupted;
      this.#lines.close();
    } else {
      this.#wantsToLeave = true;
      log('\n(Ctrl-C once more leaves)');
      this.#ask();
    }
  }

  // False: leave.
  async #handle(line: string): Promise<boolean> {
    this.#wantsToLeave = false;
    const [command, ...rest] = line.split(' ');
    switch (command) {
      case '':
        break;
      case '/exit':
      case '/quit':
        return false;
      case '/help':
        log(HELP);
        break;
      case '/clear':
        this.#history = [];
        this.#pictures = [];
        break;
      case '/image':
        if (rest.length === 0) log('/image needs the path or URL of a picture');
        else this.#pictures.push(rest.join(' '));
        break;
      default:
        await this.#answer(line);
    }
    return true;
  }

  async #answer(text: string): Promise<void> {
    const question = { role: 'user', content: this.#content(text) } as const;
    this.#answering = new AbortController();
    const { signal } = this.#answering;
    const messages = [...this.#opening, ...this.#history, question];
    let answer = '';
    try {
      for await (const part of this.#pipe.stream(messages, { ...this.#options, signal })) {
        answer += part.text;
        process.stdout.write(part.text);
      }
    } catch (error) {
      if (!signal.aborted) log(describeError(error));
    } finally {
      this.#answering = undefined;
      process.stdout.write('\n');
    }
    // What was said stays said, an interrupted answer too; a failed question is forgotten.
    if (answer !== '') this.#history.push(question, { role: 'assistant', content: answer });
  }

  #content(text: string): ContentPartInput[] {
    const pictures = this.#pictures.map((image) => ({ type: 'image', image }) as const);
    this.#pictures = [];
    return [...pictures, { type: 'text', text }];
  }
}
