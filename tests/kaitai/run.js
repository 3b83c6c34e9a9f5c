// Compiles spec/lynx.ksy and reads every vector with the result; prints one JSON object: what was read, and every difference.
// Usage: node run.js FOLDER-OF-NODE-MODULES SPEC-FOLDER
"use strict";
const fs = require("fs");
const path = require("path");
const { createRequire } = require("module");

const [modules, spec] = process.argv.slice(2);
const load = createRequire(path.join(path.resolve(modules), "x.js"));
const KaitaiStream = load("kaitai-struct/KaitaiStream");
const compiler = load("kaitai-struct-compiler");
const YAML = load("yaml");

const CHUNK = ["level", "attempt", "layer", "headStart", "heads", "tokenStart", "tokenStop", "codec"];
const snake = (name) => name.replace(/[A-Z]/g, (c) => "_" + c.toLowerCase());
const hex = (bytes) => Buffer.from(bytes).toString("hex");

async function compile() {
  const ksy = YAML.parse(fs.readFileSync(path.join(spec, "lynx.ksy"), "utf8"));
  const files = await compiler.compile("javascript", ksy, undefined, false);
  const module = { exports: {} };
  new Function("module", "exports", "require", files["Lynx.js"])(module, module.exports, load);
  return module.exports.Lynx || module.exports;
}

async function main() {
  const Lynx = await compile();
  const stream = (data) => new KaitaiStream(Buffer.from(data, "hex"));
  const found = { frames: 0, payloads: 0, captures: 0, refused: 0, sessions: 0, differences: [] };
  const differ = (where, what) => found.differences.push(`${where}: ${what}`);

  function readFrames(where, data) {
    const read = new Lynx(stream(data));
    found.frames += read.frames.length;
    return read.frames;
  }

  function compareFrame(where, frame, told) {
    const h = frame.header;
    const same = (name, one, other) => one === other || differ(where, `${name} is ${one}, not ${other}`);
    same("type", h.typeNumber, told.type);
    same("flags", h.flags, told.flags);
    same("transfer", hex(h.transfer), told.transfer);
    same("payload_length", h.payloadLength, told.payload_length);
    if (!h.isData) return;
    for (const name of CHUNK) same(name, h[name], told[snake(name)]);
    same("part", h.part, told.part);
    same("codec_id", h.codecId, told.codec_id);
    same("bitmap", frame.extension ? hex(frame.extension.bitmap) : "", told.bitmap);
  }

  function attempt(where, read, valid) {
    try {
      read();
    } catch (error) {
      if (valid) differ(where, error.message);
      found.refused += 1;
    }
  }

  const folder = path.join(spec, "vectors");
  for (const name of fs.readdirSync(folder).filter((n) => n.endsWith(".json") && n !== "schema.json").sort()) {
    for (const group of JSON.parse(fs.readFileSync(path.join(folder, name), "utf8")).groups) {
      for (const test of group.tests) {
        const where = `${name.slice(0, -5)}/${group.op}/${test.tcId}`;
        const { input, expected } = test;
        const valid = test.result === "valid";
        if (group.op === "frames") {
          const whole = valid ? input.data.slice(0, input.data.length - 2 * expected.rest) : input.data;
          attempt(where, () => {
            const frames = readFrames(where, whole);
            if (!valid) return;
            if (frames.length !== expected.frames.length) differ(where, `${frames.length} frames`);
            frames.forEach((frame, i) => compareFrame(where, frame, expected.frames[i]));
          }, valid);
        } else if (group.op === "session") {
          const streams = {};
          for (const step of input.script.filter((s) => s.data)) {
            const key = `${step.stripe}/${step.from}`;
            streams[key] = (streams[key] || "") + step.data;
          }
          const cut = input.script.some((s) => s.event) || !valid;
          for (const key of Object.keys(streams)) {
            attempt(`${where} ${key}`, () => readFrames(where, streams[key]), !cut);
          }
          found.sessions += 1;
        } else if (group.op === "capture") {
          attempt(where, () => {
            const read = new Lynx.Capture(stream(input.data), null, null);
            found.captures += 1;
            if (!valid) return;
            const told = read.records.map((r) => [r.length, r.kind, r.direction, r.stripe, hex(r.data)].join());
            const due = expected.records.map((r) => [r.length, r.kind, r.direction, r.stripe, r.data].join());
            if (told.join(";") !== due.join(";")) differ(where, `records ${told}`);
          }, valid);
        } else if (group.op === "decode" && valid && ["hq", "bitplane"].includes(input.codec.id)) {
          input.payloads.forEach((payload, level) => attempt(where, () => {
            const type = input.codec.id === "hq" ? Lynx.HqPayload : Lynx.BitplanePayload;
            const read = new type(stream(payload), null, null);
            if (read.level !== level) differ(where, `level ${read.level}`);
            found.payloads += 1;
          }, true));
        }
      }
    }
  }
  console.log(JSON.stringify(found));
}

main().catch((error) => {
  console.error(error.stack || error);
  process.exit(1);
});
