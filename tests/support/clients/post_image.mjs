// node post_image.mjs URL IMAGE: posts the image as a body, as a body of unknown length, as a form,
// and prints each answer in a line.

import { openAsBlob } from 'node:fs';
import { basename } from 'node:path';

const [url, path] = process.argv.slice(2);
const image = await openAsBlob(path);
const headers = { 'Content-Type': 'image/jpeg' };
const form = new FormData();
form.append('images', image, basename(path));
for (const request of [
  { headers, body: image },
  { headers, body: image.stream(), duplex: 'half' },
  { body: form },
]) {
  const response = await fetch(url, { method: 'POST', ...request });
  console.log(await response.text());
}
