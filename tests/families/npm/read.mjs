// What llama.cpp makes of GGUF files: the ids of texts, and the logarithm of each token's probability behind some ids.
// Reads {"questions": [{"model", "texts", "ids"}], "answers"} as JSON; the file `answers` gets [{"ids", "logarithms"}].
import {readFileSync, writeFileSync} from "node:fs";
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const asked = JSON.parse(readFileSync(0, "utf8"));
const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error});
const options = {temperature: 1, topK: 0, topP: 1, minP: 0}; // nothing is left out, nothing is made likelier
const answers = [];
for (const {model: modelPath, texts, ids} of asked.questions) {
    const model = await llama.loadModel({modelPath, useMmap: false});
    const context = await model.createContext({contextSize: 256, threads: 2});
    const input = [...ids.slice(0, -1), [ids.at(-1), {generateNext: {probabilities: true, options}}]];
    const {probabilities} = (await context.getSequence().controlledEvaluate(input)).at(-1).next;
    answers.push({
        ids: texts.map((text) => [...model.tokenize(text, true)]),
        logarithms: Array.from({length: probabilities.size}, (_, id) => Math.log(probabilities.get(id)))
    });
    await model.dispose();
}
writeFileSync(asked.answers, JSON.stringify(answers));
process.exit(0);
