// One question about one picture, then a batch. Run from the repository after `npm run build`:
//   node examples/ask.mjs
import { fileURLToPath } from 'node:url';
import { pipeline } from '@org/turbomind-node';

const pipe = await pipeline();
const picture = fileURLToPath(new URL('shapes.png', import.meta.url));

const answer = await pipe({ text: 'What colour is the largest shape?', images: [picture] });
console.log(answer.text, answer.timings);

const answers = await pipe(['What is 27 + 45?', 'Spell the word house.', 'Reverse the word cat.']);
for (const { text } of answers) console.log(text);

await pipe.close();
