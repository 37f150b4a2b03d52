// Greedy decoding with onnxruntime-node: node decode.mjs MODEL PROMPT STEPS ADAPTER.safetensors... prints a row of
// tokens per adapter, all generated in one session.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

const ort = createRequire(process.cwd() + "/")("onnxruntime-node");
const [model, words, steps, ...adapters] = process.argv.slice(2);
const session = await ort.InferenceSession.create(model);
const int64 = (values, shape) => new ort.Tensor("int64", BigInt64Array.from(values.map(BigInt)), shape);

function slots(path) {
  const bytes = readFileSync(path);
  const size = Number(bytes.readBigUInt64LE(0));
  const header = JSON.parse(bytes.subarray(8, 8 + size).toString());
  const made = {};
  delete header.__metadata__;
  for (const [name, { shape, data_offsets: [from, to] }] of Object.entries(header)) {
    const part = new Uint8Array(bytes.subarray(8 + size + from, 8 + size + to));
    made[name] = new ort.Tensor("float32", new Float32Array(part.buffer), shape);
  }
  return made;
}

for (const adapter of adapters) {
  const own = slots(adapter);
  let ids = words.split(",").map(Number), fresh = ids, past = {};
  for (const { name, shape } of session.inputMetadata) {
    if (!name.startsWith("past_key_values.")) continue;
    past[name] = new ort.Tensor("float32", new Float32Array(0), [1, shape[1], 0, shape[3]]);
  }
  for (let step = 0; step < Number(steps); step++) {
    const places = fresh.map((_, i) => ids.length - fresh.length + i);
    const feed = {
      input_ids: int64(fresh, [1, fresh.length]), attention_mask: int64(ids.map(() => 1), [1, ids.length]),
      position_ids: int64(places, [1, fresh.length]), ...past, ...own,
    };
    if (session.inputNames.includes("num_logits_to_keep")) feed.num_logits_to_keep = int64([1], []);
    const found = await session.run(feed);
    const [, count, vocabulary] = found.logits.dims;
    const last = found.logits.data.subarray((count - 1) * vocabulary);
    fresh = [last.indexOf(last.reduce((a, b) => Math.max(a, b)))];
    ids = [...ids, ...fresh];
    past = {};
    for (const [name, value] of Object.entries(found)) {
      if (name.startsWith("present.")) past[name.replace("present", "past_key_values")] = value;
    }
  }
  console.log(JSON.stringify(ids));
}
