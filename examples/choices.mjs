// Several answers to one prompt, with log probabilities. Run from the repository after
// `npm run build`:
//   node examples/choices.mjs
import { pipeline } from '@org/turbomind-node';

const pipe = await pipeline();

// It never learned to sort words: the answers differ. Of what it knows it is sure.
const { choices } = await pipe('Sort these words: b, a', {
  n: 3,
  doSample: true,
  temperature: 1.2,
  randomSeed: 1,
});
for (const { choice, text } of choices ?? []) console.log(choice, text);

const { logprobs } = await pipe('What is 27 + 45?', { topLogprobs: 3, maxNewTokens: 8 });
for (const { tokenId, logprob, topLogprobs } of logprobs ?? []) {
  const others = topLogprobs.map(([id, value]) => `${pipe.decode([id])} ${value.toFixed(2)}`);
  console.log(JSON.stringify(pipe.decode([tokenId])), logprob.toFixed(3), others.join(' | '));
}

for await (const part of pipe.stream('Hello!', { n: 2, doSample: true, randomSeed: 7 })) {
  if (part.response) console.log(`choice ${part.choice}:`, part.response.text);
}

await pipe.close();
