// Greedy decoding with transformers.js: node generate.mjs FOLDER TEXT STEPS prints what follows the text.
import { createRequire } from "node:module";
import { basename, dirname } from "node:path";
import { pathToFileURL } from "node:url";

const found = createRequire(process.cwd() + "/").resolve("@huggingface/transformers");
const { AutoModelForCausalLM, AutoTokenizer, env } = await import(pathToFileURL(found));
const [folder, text, steps] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const tokenizer = await AutoTokenizer.from_pretrained(basename(folder));
const model = await AutoModelForCausalLM.from_pretrained(basename(folder), { device: "cpu" });

const inputs = tokenizer(text);
const made = await model.generate({ ...inputs, max_new_tokens: Number(steps), do_sample: false });
const tokens = made.tolist()[0].slice(inputs.input_ids.dims[1]).map(Number);
console.log(JSON.stringify({ tokens, text: tokenizer.decode(tokens, { skip_special_tokens: true }) }));
