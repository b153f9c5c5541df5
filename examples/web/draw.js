/* Draws a picture from a bundle's loop graph: the prompt's tokens and a seed's noise in, pixels out. The graph has the
   text encoder, the sampling loop and the decoder in it; the rest of a runtime is this file. */

import * as ort from "./ort/ort.wasm.min.mjs";

if (!globalThis.crossOriginIsolated) ort.env.wasm.numThreads = 1;  // threads need shared memory, and that two headers

/** An opened loop graph, with what the bundle's manifest says of it. */
export class Model {
  /** Opens `loops/NAME.onnx` of the bundle at a URL, such as ("bundle", "ddim-20"). */
  static async load(bundle, name) {
    const manifest = await fetched(`${bundle}/manifest.json`, "json");
    const graph = manifest.graphs[`loops/${name}`];
    if (!graph) throw new Error(`The bundle has no loop ${name}. Add it with: ldm-export plan BUNDLE --loop`);
    const model = new Model();
    model.facts = manifest.model;
    model.roles = manifest.roles;
    model.inputs = new Map(graph.inputs.map((input) => [input.name, input]));
    const other = model.roles.text_encoders.find((encoder) => encoder.kind !== "clip");
    if (other) throw new Error(`The ${other.graph} reads a ${other.kind} tokenizer; this page has CLIP's alone. Give the loop ids of your own.`);
    const folders = model.roles.text_encoders.map((encoder) => `${bundle}/${encoder.tokenizer}`);
    model.tokenizers = await Promise.all(folders.map((folder) => Tokenizer.load(folder)));
    const [loop, weights] = await Promise.all([
      fetched(`${bundle}/${graph.path}`, "arrayBuffer"),
      fetched(`${bundle}/loops/weights.onnx_data`, "arrayBuffer"),
    ]);
    const whole = withWeights(new Uint8Array(loop), new Uint8Array(weights));
    model.session = await ort.InferenceSession.create(whole, { executionProviders: ["wasm"] });
    return model;
  }

  /** One picture as ImageData; of the options, the graph is given those that it takes. */
  async draw({ prompt = "", negative = null, classLabel = 0, guidance = this.roles.guidance.scale, seed = 0 }) {
    const { latent_channels: channels, pixels_per_latent: factor, height, width } = this.facts;
    const shape = [1, channels, height / factor, width / factor], size = shape.reduce((a, b) => a * b);
    const generator = new Generator(seed);
    const draws = this.inputs.get("step_noise")?.shape[0] ?? 0;
    const noise = generator.randn(size);
    const stepNoise = new Float32Array(draws * size);
    for (let k = 0; k < draws; k++) stepNoise.set(generator.randn(size), k * size);
    const tokens = (tokenizer, text) => {
      const ids = tokenizer.encode(text);
      return new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]);
    };
    const makers = {
      has_negative_prompt: () => new ort.Tensor("float32", [negative === null ? 0 : 1], [1]),
      class_labels: () => new ort.Tensor("int64", [BigInt(classLabel)], [1]),
      noise: () => new ort.Tensor("float32", noise, shape),
      step_noise: () => new ort.Tensor("float32", stepNoise, [draws, ...shape]),
      guidance_scale: () => new ort.Tensor("float32", [guidance], []),
    };
    this.tokenizers.forEach((tokenizer, k) => {
      const suffix = k ? `_${k + 1}` : "";
      makers[`input_ids${suffix}`] = () => tokens(tokenizer, prompt);
      makers[`negative_input_ids${suffix}`] = () => tokens(tokenizer, negative ?? "");
    });
    const feeds = Object.fromEntries([...this.inputs.keys()].map((name) => [name, makers[name]()]));
    const { images } = await this.session.run(feeds, ["images"]);
    return imageData(images);
  }
}

/** uint8 (1, H, W, C), C being 3, or 1 for grey, as a canvas takes it. */
function imageData({ data, dims: [, height, width, channels] }) {
  const picture = new ImageData(width, height);
  for (let i = 0; i < height * width; i++) {
    for (let c = 0; c < 3; c++) picture.data[4 * i + c] = data[channels * i + Math.min(c, channels - 1)];
    picture.data[4 * i + 3] = 255;
  }
  return picture;
}

/** CLIP's byte-pair encoding of lower-cased text (Radford et al. 2021), from `vocab.json` and `merges.txt`. */
export class Tokenizer {
  static WORDS = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/gu;
  static LETTERS = byteLetters();

  static async load(folder) {
    const [vocab, merges, config] = await Promise.all([
      fetched(`${folder}/vocab.json`, "json"),
      fetched(`${folder}/merges.txt`, "text"),
      fetched(`${folder}/tokenizer_config.json`, "json"),
    ]);
    return new Tokenizer(vocab, merges, config);
  }

  constructor(vocab, merges, config) {
    const lines = merges.split("\n").filter((line) => line && !line.startsWith("#version"));
    const named = (token, otherwise) => vocab[token?.content ?? token ?? otherwise];
    this.vocab = vocab;
    this.ranks = new Map(lines.map((line, rank) => [line, rank]));
    this.length = config.model_max_length > 1 << 20 ? 77 : config.model_max_length ?? 77;
    this.start = named(config.bos_token, "<|startoftext|>");
    this.end = named(config.eos_token, "<|endoftext|>");
    this.pad = named(config.pad_token, "<|endoftext|>");
    this.unknown = named(config.unk_token, "<|endoftext|>");
  }

  /** Token ids between the start and the end token, cut or padded to the length that the model reads. */
  encode(text) {
    const plain = Array.from(text.normalize("NFC").replace(/\s+/gu, " "), (letter) => letter.toLowerCase()).join("");
    const ids = (plain.match(Tokenizer.WORDS) ?? []).flatMap((word) =>
      /^<\|(start|end)oftext\|>$/.test(word) ? [this.vocab[word]] : this.#merged(word));
    const row = [this.start, ...ids.slice(0, this.length - 2), this.end];
    return [...row, ...Array(this.length - row.length).fill(this.pad)];
  }

  /** The ids of a word: its bytes, joined pair by pair, the earliest learned pair first. */
  #merged(word) {
    let parts = Array.from(new TextEncoder().encode(word), (byte) => Tokenizer.LETTERS[byte]);
    parts[parts.length - 1] += "</w>";
    for (;;) {
      const ranks = parts.slice(1).map((part, i) => this.ranks.get(`${parts[i]} ${part}`) ?? Infinity);
      const best = Math.min(...ranks);
      if (best === Infinity) return parts.map((part) => this.vocab[part] ?? this.unknown);
      parts.splice(ranks.indexOf(best), 2, parts[ranks.indexOf(best)] + parts[ranks.indexOf(best) + 1]);
    }
  }
}

/** The printable letter that stands for each byte: itself where it is printable, else one from 256 on. */
function byteLetters() {
  const printable = (byte) => (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
  let hidden = 256;
  return Array.from({ length: 256 }, (_, byte) => String.fromCharCode(printable(byte) ? byte : hidden++));
}

/** Normal noise equal to `torch.randn` on a CPU generator; ldm_export/runtime/noise.py describes the algorithm. */
export class Generator {
  #state = new Uint32Array(624);
  #used = 624;
  #spare;

  constructor(seed) {
    this.#state[0] = Number(BigInt.asUintN(32, BigInt(seed)));
    for (let i = 1; i < 624; i++) {
      const before = this.#state[i - 1];
      this.#state[i] = Math.imul(1812433253, before ^ (before >>> 30)) + i;
    }
  }

  /** `count` values of N(0, 1), float32. */
  randn(count) {
    if (count < 16) return Float32Array.from({ length: count }, () => this.#one());
    const values = this.#uniform(count);
    for (let at = 0; at + 16 <= count; at += 16) boxMuller(values.subarray(at, at + 16));
    if (count % 16) {
      values.set(this.#uniform(16), count - 16);
      boxMuller(values.subarray(count - 16));
    }
    return values;
  }

  #uniform(count) {
    return Float32Array.from({ length: count }, () => (this.#word() & 0xffffff) * 2 ** -24);
  }

  #one() {
    if (this.#spare !== undefined) {
      const value = this.#spare;
      this.#spare = undefined;
      return value;
    }
    const uniform = () => ((this.#word() & 0x1fffff) * 2 ** 32 + this.#word()) * 2 ** -53;  // the high word comes first
    const angle = 2 * Math.PI * uniform(), radius = Math.sqrt(-2 * Math.log1p(-uniform()));
    this.#spare = radius * Math.sin(angle);
    return radius * Math.cos(angle);
  }

  /** The Mersenne twister's next tempered 32 bits (Matsumoto & Nishimura 1998). */
  #word() {
    if (this.#used === 624) this.#twist();
    let word = this.#state[this.#used++];
    word ^= word >>> 11;
    word ^= (word << 7) & 0x9d2c5680;
    word ^= (word << 15) & 0xefc60000;
    return (word ^ (word >>> 18)) >>> 0;
  }

  #twist() {
    const state = this.#state;
    for (let i = 0; i < 624; i++) {
      const bits = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
      state[i] = state[(i + 397) % 624] ^ (bits >>> 1) ^ (bits & 1 ? 0x9908b0df : 0);
    }
    this.#used = 0;
  }
}

/** Sixteen uniforms become sixteen normal values in place. */
function boxMuller(values) {
  const { fround, log, sqrt, cos, sin, PI } = Math;
  for (let j = 0; j < 8; j++) {
    const radius = sqrt(-2 * log(1 - values[j]));
    const angle = fround(fround(2 * PI) * values[j + 8]);
    values[j] = radius * cos(angle);
    values[j + 8] = radius * sin(angle);
  }
}

/* The loop's weights lie in a file beside it, and in the body of its Loop. ONNX Runtime Web takes such files as the option
   `externalData`, but 1.30 does not look there for the tensors of nested graphs; so they are put into the model here. It is
   a protobuf message: a run of fields, each a varint `number << 3 | wire type` and, of those that matter, a length and a
   content. The map has the fields that lead to tensors. */
const INSIDE = { model: { 7: "graph" }, graph: { 1: "node", 5: "tensor" }, node: { 5: "attribute" }, attribute: { 6: "graph" } };
const RAW_DATA = 9, EXTERNAL_DATA = 13, DATA_LOCATION = 14;

/** An ONNX model (bytes) that reads no other file, from one that reads `weights` (bytes). */
export function withWeights(model, weights) {
  const parts = filled(model, "model", weights);
  const whole = new Uint8Array(parts.reduce((size, part) => size + part.length, 0));
  parts.reduce((at, part) => (whole.set(part, at), at + part.length), 0);
  return whole;
}

/** A message, in parts, with every tensor's data in it. */
function filled(bytes, message, weights) {
  if (message === "tensor") return filledTensor(bytes, weights);
  return [...fields(bytes)].flatMap(({ number, whole, content }) => {
    const inside = content && INSIDE[message][number];
    return inside ? delimited(number, filled(content, inside, weights)) : [whole];
  });
}

function filledTensor(bytes, weights) {
  const all = [...fields(bytes)], decoder = new TextDecoder();
  const entries = all.filter(({ number }) => number === EXTERNAL_DATA).map(({ content }) =>
    [...fields(content)].map((field) => decoder.decode(field.content)));
  if (!entries.length) return [bytes];
  const { offset, length } = Object.fromEntries(entries);
  const data = weights.subarray(Number(offset), Number(offset) + Number(length));
  const kept = all.filter(({ number }) => number !== EXTERNAL_DATA && number !== DATA_LOCATION);
  return [...kept.map(({ whole }) => whole), ...delimited(RAW_DATA, [data])];
}

/** The fields of a message: number, the field's own bytes and, if it has a length, its content. */
function* fields(bytes) {
  let at = 0;
  const varint = () => {
    let value = 0, scale = 1;
    for (; bytes[at] & 0x80; scale *= 128) value += (bytes[at++] & 0x7f) * scale;
    return value + bytes[at++] * scale;
  };
  while (at < bytes.length) {
    const start = at, key = varint(), type = key % 8;
    let content;
    if (type === 0) varint();
    else if (type === 2) {
      const length = varint();
      content = bytes.subarray(at, at + length);
      at += length;
    } else at += type === 1 ? 8 : 4;
    yield { number: (key - type) / 8, whole: bytes.subarray(start, at), content };
  }
}

/** A field with a length, in parts. */
function delimited(number, parts) {
  const varint = (value) => {
    const written = [];
    for (; value > 127; value = Math.floor(value / 128)) written.push((value % 128) | 0x80);
    return Uint8Array.from([...written, value]);
  };
  const length = parts.reduce((size, part) => size + part.length, 0);
  return [varint(number * 8 + 2), varint(length), ...parts];
}

async function fetched(url, kind) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url} cannot be read (${response.status}). Put the bundle beside the page.`);
  return response[kind]();
}
