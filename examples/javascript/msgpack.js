// msgpack for the wire of docs/protocol.md: plain values, typed arrays and images <-> one frame.
//
// Our own because of one thing that packages do not do: the keys that mark an array are msgpack *bin*, not text, and a
// map with such keys is an array. Everything else is the msgpack specification, without its extension types.
// Error policy: `pack` and `unpack` throw a WireError with a sentence; nothing is read beyond the frame.

export class WireError extends Error {}

/** An (H, W, 3) image, an action chunk, a state: typed data with a shape, C order. */
export class NdArray {
  /**
   * @param {Float32Array|Float64Array|Uint8Array|Int32Array|BigInt64Array} data
   * @param {number[]} shape
   */
  constructor(data, shape) {
    const size = shape.reduce((product, length) => product * length, 1);
    if (size !== data.length) throw new WireError(`${data.length} values for the shape ${shape}; ${size} were expected`);
    this.data = data;
    this.shape = shape;
  }

  /** Row `index` of a two-dimensional array, such as one action of a chunk. */
  row(index) {
    const width = this.shape[1];
    return this.data.subarray(index * width, (index + 1) * width);
  }
}

/** A compressed image; `data` is the file's content, `shape` its [height, width, 3]. */
export class EncodedImage {
  constructor(codec, data, shape) {
    Object.assign(this, { codec, data, shape });
  }
}

// NumPy's names of little-endian types. bool travels as bytes of 0 and 1.
const TYPES = {
  "|b1": Uint8Array, "|u1": Uint8Array, "|i1": Int8Array,
  "<u2": Uint16Array, "<i2": Int16Array, "<u4": Uint32Array, "<i4": Int32Array,
  "<u8": BigUint64Array, "<i8": BigInt64Array, "<f4": Float32Array, "<f8": Float64Array,
};
const dtypeOf = (data) => {
  const found = Object.entries(TYPES).find(([name, type]) => name !== "|b1" && data.constructor === type);
  if (!found) throw new WireError(`an array of ${data.constructor.name}; a typed array of numbers was expected`);
  return found[0];
};

const text = new TextEncoder();
const utf8 = new TextDecoder("utf-8", { fatal: true });
/** A key that is packed as bin. */
class Bin {
  constructor(key) {
    this.bytes = text.encode(key);
  }
}
const [NDARRAY, DATA, DTYPE, SHAPE] = ["__ndarray__", "data", "dtype", "shape"].map((key) => new Bin(key));

/** One frame. Undefined members of an object are left out. */
export function pack(value) {
  const parts = [];
  let length = 0;
  const put = (bytes) => {
    parts.push(bytes);
    length += bytes.byteLength;
  };
  /** A head: the byte, then `count` as an unsigned number of `size` bytes, big endian. */
  const head = (byte, count, size) => {
    const view = new DataView(new ArrayBuffer(1 + size));
    view.setUint8(0, byte);
    if (size === 1) view.setUint8(1, count);
    if (size === 2) view.setUint16(1, count);
    if (size === 4) view.setUint32(1, count);
    put(new Uint8Array(view.buffer));
  };
  const bin = (bytes) => {
    if (bytes.byteLength < 256) head(0xc4, bytes.byteLength, 1);
    else if (bytes.byteLength < 65536) head(0xc5, bytes.byteLength, 2);
    else head(0xc6, bytes.byteLength, 4);
    put(bytes);
  };
  const string = (characters) => {
    const bytes = text.encode(characters);
    if (bytes.length < 32) head(0xa0 | bytes.length, 0, 0);
    else if (bytes.length < 256) head(0xd9, bytes.length, 1);
    else if (bytes.length < 65536) head(0xda, bytes.length, 2);
    else head(0xdb, bytes.length, 4);
    put(bytes);
  };
  const number = (value) => {
    if (Number.isInteger(value) && value >= 0 && value < 128) return head(value, 0, 0);
    if (Number.isInteger(value) && value >= 0 && value < 2 ** 32) return head(0xce, value, 4);
    const view = new DataView(new ArrayBuffer(9));
    if (Number.isSafeInteger(value)) {
      view.setUint8(0, 0xd3);
      view.setBigInt64(1, BigInt(value));
    } else {
      view.setUint8(0, 0xcb);
      view.setFloat64(1, value);
    }
    return put(new Uint8Array(view.buffer));
  };
  const map = (entries) => {
    if (entries.length < 16) head(0x80 | entries.length, 0, 0);
    else head(0xde, entries.length, 2);
    for (const [key, item] of entries) {
      if (key instanceof Bin) bin(key.bytes);
      else string(key);
      write(item);
    }
  };
  const write = (value) => {
    if (value === null) return head(0xc0, 0, 0);
    if (typeof value === "boolean") return head(value ? 0xc3 : 0xc2, 0, 0);
    if (typeof value === "number") return number(value);
    if (typeof value === "string") return string(value);
    if (value instanceof NdArray) {
      const { buffer, byteOffset, byteLength } = value.data;
      const data = new Uint8Array(buffer, byteOffset, byteLength);
      return map([[NDARRAY, true], [DATA, data], [DTYPE, dtypeOf(value.data)], [SHAPE, value.shape]]);
    }
    if (value instanceof EncodedImage) {
      return map([["__image__", value.codec], ["data", value.data], ["shape", value.shape]]);
    }
    if (value instanceof Uint8Array) return bin(value);
    if (Array.isArray(value)) {
      if (value.length < 16) head(0x90 | value.length, 0, 0);
      else head(0xdc, value.length, 2);
      return value.forEach(write);
    }
    if (typeof value === "object") return map(Object.entries(value).filter(([, item]) => item !== undefined));
    throw new WireError(`a value of type ${typeof value}; numbers, texts, arrays and maps travel`);
  };
  write(value);
  const frame = new Uint8Array(length);
  let at = 0;
  for (const part of parts) {
    frame.set(part, at);
    at += part.byteLength;
  }
  return frame;
}

/** The value in one frame; arrays are NdArrays, compressed images EncodedImages. */
export function unpack(frame) {
  const bytes = new Uint8Array(frame);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let at = 0;
  const take = (count) => {
    if (at + count > bytes.length) {
      throw new WireError(`the frame ends at ${bytes.length}, in a value of ${count} bytes at ${at}`);
    }
    at += count;
    return at - count;
  };
  const count = (size) => {
    const from = take(size);
    if (size === 1) return view.getUint8(from);
    return size === 2 ? view.getUint16(from) : view.getUint32(from);
  };
  const raw = (length) => {
    const from = take(length);
    return bytes.subarray(from, from + length);
  };
  const string = (length) => utf8.decode(raw(length));
  const list = (length) => Array.from({ length }, read);
  // Beyond 2 ** 53 a BigInt stays one.
  const whole = (value) => (Number.isSafeInteger(Number(value)) ? Number(value) : value);
  const map = (length) => {
    const result = Object.create(null);
    for (let i = 0; i < length; i++) {
      const key = read();
      result[key instanceof Uint8Array ? utf8.decode(key) : key] = read();
    }
    return special(result);
  };
  const NUMBERS = [
    () => view.getFloat32(take(4)),
    () => view.getFloat64(take(8)),
    () => view.getUint8(take(1)),
    () => view.getUint16(take(2)),
    () => view.getUint32(take(4)),
    () => whole(view.getBigUint64(take(8))),
    () => view.getInt8(take(1)),
    () => view.getInt16(take(2)),
    () => view.getInt32(take(4)),
    () => whole(view.getBigInt64(take(8))),
  ];
  const read = () => {
    const byte = view.getUint8(take(1));
    if (byte < 0x80) return byte;
    if (byte < 0x90) return map(byte & 0x0f);
    if (byte < 0xa0) return list(byte & 0x0f);
    if (byte < 0xc0) return string(byte & 0x1f);
    if (byte >= 0xe0) return byte - 256;
    if (byte === 0xc0) return null;
    if (byte === 0xc2 || byte === 0xc3) return byte === 0xc3;
    if (byte >= 0xc4 && byte <= 0xc6) return raw(count(1 << (byte - 0xc4)));
    if (byte >= 0xca && byte <= 0xd3) return NUMBERS[byte - 0xca]();
    if (byte >= 0xd9 && byte <= 0xdb) return string(count(1 << (byte - 0xd9)));
    if (byte === 0xdc || byte === 0xdd) return list(count(byte === 0xdc ? 2 : 4));
    if (byte === 0xde || byte === 0xdf) return map(count(byte === 0xde ? 2 : 4));
    throw new WireError(`the byte 0x${byte.toString(16)} at ${at - 1}; plain msgpack was expected`);
  };
  const value = read();
  if (at !== bytes.length) throw new WireError(`${bytes.length - at} surplus bytes behind the value`);
  return value;
}

function special(map) {
  if (map.__ndarray__) {
    const type = TYPES[map.dtype];
    if (!type) {
      throw new WireError(`an array of the dtype ${map.dtype}; one of ${Object.keys(TYPES).join(", ")} was expected`);
    }
    if (map.data.byteLength % type.BYTES_PER_ELEMENT) {
      throw new WireError(`${map.data.byteLength} bytes are no whole number of ${map.dtype} values`);
    }
    // A copy: the data need not lie where a typed array may begin.
    return new NdArray(new type(map.data.slice().buffer), map.shape);
  }
  if (map.__npgeneric__) return map.data;
  if (map.__image__) return new EncodedImage(map.__image__, map.data, map.shape);
  return map;
}
