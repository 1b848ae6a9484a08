export function problemsOf(schema: unknown, value: unknown): string[];
