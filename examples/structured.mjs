// A receipt's text → JSON that is valid under a schema, whatever the model would rather say.
//   node examples/structured.mjs [model folder] [picture]
import { pipeline } from '@org/turbomind-node';

const [model, picture] = process.argv.slice(2);
const schema = {
  type: 'object',
  properties: {
    merchant: { type: 'string', maxLength: 30 },
    date: { type: 'string', format: 'date' },
    currency: { enum: ['EUR', 'USD', 'GBP'] },
    items: {
      type: 'array',
      maxItems: 5,
      items: {
        type: 'object',
        properties: {
          name: { type: 'string', maxLength: 20 },
          price: { type: 'number', minimum: 0, maximum: 9999.99, multipleOf: 0.01 },
        },
        required: ['name', 'price'],
      },
    },
    total: { type: 'number', minimum: 0, multipleOf: 0.01 },
  },
  required: ['merchant', 'date', 'currency', 'items', 'total'],
};

const receipt = 'Cafe Blau, 2026-03-14. Espresso 2.80 EUR, cake 4.20 EUR. Total 7.00 EUR.';
const text = picture ? 'Read this receipt as JSON.' : `Write this receipt as JSON: ${receipt}`;
const pipe = await pipeline(model);
const response = await pipe(picture ? { text, images: [picture] } : text, {
  responseFormat: { type: 'json_schema', jsonSchema: { name: 'receipt', schema } },
  maxNewTokens: null,
});
if (response.finishReason !== 'stop') throw new Error(`cut short: ${response.finishReason}`);
console.log(JSON.parse(response.text));
await pipe.close();
