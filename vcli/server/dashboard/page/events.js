// Server-sent events over fetch, which can bring a key along where EventSource cannot.

const KEY = "vcli-api-key";

export function storedKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function storeKey(key) {
  sessionStorage.setItem(KEY, key);
}

export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

// Ask this server. Raises Refused for any answer but a success, with the words of the server.
export async function ask(path, options = {}) {
  const headers = { ...options.headers };
  if (storedKey()) headers.Authorization = `Bearer ${storedKey()}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const text = await response.text();
  let message = text.slice(0, 300) || response.statusText;
  try {
    message = JSON.parse(text).error.message;
  } catch {
    // no error of the API: of a proxy, perhaps
  }
  throw new Refused(response.status, message);
}

// The events of a response: {name, data}, the data as text.
export async function* events(response) {
  let rest = "";
  for await (const text of pieces(response.body.pipeThrough(new TextDecoderStream()))) {
    const blocks = (rest + text).split("\n\n");
    rest = blocks.pop();
    for (const block of blocks) {
      const event = { name: "message", data: "" };
      for (const line of block.split("\n")) {
        if (line.startsWith("event:")) event.name = line.slice(6).trim();
        if (line.startsWith("data:")) event.data += line.slice(5).trim();
      }
      if (event.data) yield event;
    }
  }
}

// Not every browser iterates over a stream by itself.
async function* pieces(stream) {
  const reader = stream.getReader();
  try {
    for (let { done, value } = await reader.read(); !done; { done, value } = await reader.read()) yield value;
  } finally {
    reader.cancel().catch(() => {});
  }
}
