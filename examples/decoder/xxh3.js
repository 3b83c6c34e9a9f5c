// SPDX-License-Identifier: Apache-2.0
// XXH3 of 128 bits with seed 0: wire-format.md, "Digests".
//
// The algorithm is https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md. All numbers of 64 bits are BigInts:
// slow, but as one reads them there.

const MASK = 0xffffffffffffffffn;
const LOW32 = 0xffffffffn;

const PRIME32_1 = 0x9e3779b1n;
const PRIME32_2 = 0x85ebca77n;
const PRIME32_3 = 0xc2b2ae3dn;
const PRIME64_1 = 0x9e3779b185ebca87n;
const PRIME64_2 = 0xc2b2ae3d27d4eb4fn;
const PRIME64_3 = 0x165667b19e3779f9n;
const PRIME64_4 = 0x85ebca77c2b2ae63n;
const PRIME64_5 = 0x27d4eb2f165667c5n;
const PRIME_MX1 = 0x165667919e3779f9n;
const PRIME_MX2 = 0x9fb21c651e98df25n;

const SECRET = Buffer.from(
  "b8fe6c3923a44bbe7c01812cf721ad1cded46de9839097db7240a4a4b7b3671fcb79e64eccc0e578825ad07dccff7221b8084674f743248ee0" +
    "3590e6813a264c3c2852bb91c300cb88d0658b1b532ea371644897a20df94e3819ef46a9deacd8a8fa763fe39c343ff9dcbbc7c70b4f1d8a51" +
    "e04bcdb45931c89f7ec9d9787364eac5ac8334d3ebc3c581a0fffa1363eb170ddd51b7f0da49d316552629d4689e2b16be587d47a1fc8ff8" +
    "b8d17ad031ce45cb3a8f95160428afd7fbcabb4b407e",
  "hex",
);
const STRIPE = 64;
const SECRET_STEP = 8;
const STRIPES_PER_BLOCK = (SECRET.length - STRIPE) / SECRET_STEP;

const secret = (offset) => SECRET.readBigUInt64LE(offset);

const wrap = (value) => value & MASK;
const multiply = (a, b) => (a * b) & MASK;
const fold = (a, b) => {
  const product = a * b;
  return (product & MASK) ^ (product >> 64n);
};

function swap(value, size) {
  let swapped = 0n;
  for (let i = 0; i < size; i++, value >>= 8n) swapped = (swapped << 8n) | (value & 0xffn);
  return swapped;
}

function avalanche(hash) {
  hash = multiply(hash ^ (hash >> 37n), PRIME_MX1);
  return hash ^ (hash >> 32n);
}

function avalancheXxh64(hash) {
  hash = multiply(hash ^ (hash >> 33n), PRIME64_2);
  hash = multiply(hash ^ (hash >> 29n), PRIME64_3);
  return hash ^ (hash >> 32n);
}

function hashOfNothing() {
  return [avalancheXxh64(secret(80) ^ secret(88)), avalancheXxh64(secret(64) ^ secret(72))];
}

function hashTo3(input) {
  const length = input.length;
  const low =
    (BigInt(input[0]) << 16n) |
    (BigInt(input[length >> 1]) << 24n) |
    BigInt(input[length - 1]) |
    (BigInt(length) << 8n);
  const swapped = swap(low, 4);
  const high = ((swapped << 13n) | (swapped >> 19n)) & LOW32;
  const flip = (offset) => BigInt((SECRET.readUInt32LE(offset) ^ SECRET.readUInt32LE(offset + 4)) >>> 0);
  return [avalancheXxh64(high ^ flip(8)), avalancheXxh64(low ^ flip(0))];
}

function hashTo8(input) {
  const length = input.length;
  const value = BigInt(input.readUInt32LE(0)) | (BigInt(input.readUInt32LE(length - 4)) << 32n);
  const product = (value ^ secret(16) ^ secret(24)) * wrap(PRIME64_1 + BigInt(length << 2));
  let low = product & MASK;
  let high = wrap((product >> 64n) + (low << 1n));
  low ^= high >> 3n;
  low = multiply(low ^ (low >> 35n), PRIME_MX2);
  low ^= low >> 28n;
  return [avalanche(high), low];
}

function hashTo16(input) {
  const length = input.length;
  const first = input.readBigUInt64LE(0);
  const last = input.readBigUInt64LE(length - 8);
  const product = (first ^ last ^ secret(32) ^ secret(40)) * PRIME64_1;
  let low = wrap((product & MASK) + (BigInt(length - 1) << 54n));
  const flipped = last ^ secret(48) ^ secret(56);
  const high = wrap((product >> 64n) + flipped + (flipped & LOW32) * (PRIME32_2 - 1n));
  low ^= swap(high, 8);
  const second = low * PRIME64_2;
  return [avalanche(wrap((second >> 64n) + high * PRIME64_2)), avalanche(second & MASK)];
}

/** Lengths of 17 to 240: pairs of 16 bytes are mixed into two accumulators. */
class Mixer {
  constructor(input) {
    this.input = input;
    this.low = multiply(BigInt(input.length), PRIME64_1);
    this.high = 0n;
  }

  #mix16(offset, key) {
    return fold(
      this.input.readBigUInt64LE(offset) ^ secret(key),
      this.input.readBigUInt64LE(offset + 8) ^ secret(key + 8),
    );
  }

  #sum(offset) {
    return wrap(this.input.readBigUInt64LE(offset) + this.input.readBigUInt64LE(offset + 8));
  }

  mix(a, b, key) {
    this.low = wrap(this.low + this.#mix16(a, key)) ^ this.#sum(b);
    this.high = wrap(this.high + this.#mix16(b, key + 16)) ^ this.#sum(a);
  }

  avalanche() {
    this.low = avalanche(this.low);
    this.high = avalanche(this.high);
  }

  digest() {
    const length = BigInt(this.input.length);
    const low = wrap(this.low + this.high);
    const high = wrap(this.low * PRIME64_1 + this.high * PRIME64_4 + length * PRIME64_2);
    return [wrap(-avalanche(high)), avalanche(low)];
  }
}

function hashTo128(input) {
  const length = input.length;
  const mixer = new Mixer(input);
  for (let i = (length - 1) >> 5; i >= 0; i--) mixer.mix(16 * i, length - 16 * (i + 1), 32 * i);
  return mixer.digest();
}

function hashTo240(input) {
  const length = input.length;
  const mixer = new Mixer(input);
  for (let i = 0; i < 128; i += 32) mixer.mix(i, i + 16, i);
  mixer.avalanche();
  for (let i = 128; i + 32 <= length; i += 32) mixer.mix(i, i + 16, 3 + i - 128);
  mixer.mix(length - 16, length - 32, 103);
  return mixer.digest();
}

function accumulate(accumulators, input, offset, key) {
  for (let i = 0; i < 8; i++) {
    const value = input.readBigUInt64LE(offset + 8 * i);
    const keyed = value ^ secret(key + 8 * i);
    accumulators[i ^ 1] = wrap(accumulators[i ^ 1] + value);
    accumulators[i] = wrap(accumulators[i] + (keyed & LOW32) * (keyed >> 32n));
  }
}

function scramble(accumulators) {
  const key = SECRET.length - STRIPE;
  for (let i = 0; i < 8; i++) {
    const value = accumulators[i];
    accumulators[i] = multiply(value ^ (value >> 47n) ^ secret(key + 8 * i), PRIME32_1);
  }
}

function merge(accumulators, key, start) {
  let result = start;
  for (let i = 0; i < 4; i++) {
    result += fold(accumulators[2 * i] ^ secret(key + 16 * i), accumulators[2 * i + 1] ^ secret(key + 16 * i + 8));
  }
  return avalanche(wrap(result));
}

function hashLong(input) {
  const length = input.length;
  const accumulators = [PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1];
  const stripes = Math.floor((length - 1) / STRIPE);
  for (let i = 0; i < stripes; i++) {
    const place = i % STRIPES_PER_BLOCK;
    if (i && !place) scramble(accumulators);
    accumulate(accumulators, input, STRIPE * i, SECRET_STEP * place);
  }
  if (stripes && stripes % STRIPES_PER_BLOCK === 0) scramble(accumulators);
  accumulate(accumulators, input, length - STRIPE, SECRET.length - STRIPE - 7);
  const total = BigInt(length);
  return [
    merge(accumulators, SECRET.length - STRIPE - 11, MASK ^ multiply(total, PRIME64_2)),
    merge(accumulators, 11, multiply(total, PRIME64_1)),
  ];
}

function hash(input) {
  const length = input.length;
  if (length === 0) return hashOfNothing();
  if (length <= 3) return hashTo3(input);
  if (length <= 8) return hashTo8(input);
  if (length <= 16) return hashTo16(input);
  if (length <= 128) return hashTo128(input);
  if (length <= 240) return hashTo240(input);
  return hashLong(input);
}

/** The 16 bytes of XXH3-128 in canonical order: the high half first, each half big-endian. */
export function xxh3of128(bytes) {
  const [high, low] = hash(Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength));
  const digest = Buffer.alloc(16);
  digest.writeBigUInt64BE(high, 0);
  digest.writeBigUInt64BE(low, 8);
  return digest;
}
