import { defineConfig } from 'vitest/config';

export default defineConfig({
  test: {
    globalSetup: ['test/scratch.ts'],
    projects: [
      { test: { name: 'lib', include: ['test/lib/**/*.test.ts'], testTimeout: 20_000 } },
      {
        test: {
          name: 'e2e',
          include: ['test/e2e/**/*.test.ts'],
          testTimeout: 120_000,
          hookTimeout: 120_000,
          fileParallelism: false,
        },
      },
    ],
  },
});
