// Greedy decoding of an encoder-decoder with transformers.js: node translate.mjs FOLDER STEPS SOURCE... where a source
// is token ids with commas and all are padded on the right to one length; prints a row of tokens per source.
import { createRequire } from "node:module";
import { basename, dirname } from "node:path";
import { pathToFileURL } from "node:url";

const found = createRequire(process.cwd() + "/").resolve("@huggingface/transformers");
const { AutoModelForSeq2SeqLM, Tensor, env } = await import(pathToFileURL(found));
const [folder, steps, pad, ...sources] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const model = await AutoModelForSeq2SeqLM.from_pretrained(basename(folder), { device: "cpu" });

const rows = sources.map((source) => source.split(",").map(BigInt));
const length = Math.max(...rows.map((row) => row.length));
const filled = (value) => rows.flatMap((row) => [...row.map((id) => value(id)), ...Array(length - row.length).fill(null)]);
const tensor = (values, empty) =>
  new Tensor("int64", BigInt64Array.from(values.map((value) => value ?? empty)), [rows.length, length]);
const made = await model.generate({
  input_ids: tensor(filled((id) => id), BigInt(pad)), attention_mask: tensor(filled(() => 1n), 0n),
  max_new_tokens: Number(steps), min_new_tokens: Number(steps), do_sample: false, num_beams: 1,
  forced_eos_token_id: null,
});
console.log(JSON.stringify(made.tolist().map((row) => row.map(Number))));
