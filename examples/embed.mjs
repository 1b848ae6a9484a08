// Vectors of texts, the nearest of them to a question, and which text the model foresees best. Run
// from the repository after `npm run build`:
//   node examples/embed.mjs
import { pipeline } from '@org/turbomind-node';

const pipe = await pipeline();

const texts = ['The receipt says 12.50.', 'A red circle above a blue square.', 'Spell tensor.'];
const question = await pipe.embed('Which shape is red?', { pooling: 'mean' });
const vectors = await pipe.embed(texts, { pooling: 'mean' });

// Vectors have length 1: a dot product is the cosine.
for (const [index, vector] of vectors.entries()) {
  const cosine = vector.reduce((sum, value, i) => sum + value * question[i], 0);
  console.log(cosine.toFixed(3), texts[index]);
}

const likelihoods = await pipe.getPpl(texts);
for (const [index, nats] of likelihoods.entries()) {
  console.log(`perplexity ${Math.exp(nats).toFixed(1)}:`, texts[index]);
}

await pipe.close();
