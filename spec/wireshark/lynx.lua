-- Wireshark dissector for the lynxproto wire format, version 1 (../wire-format.md, ../invariants.md).
--
--   tshark -X lua_script:spec/wireshark/lynx.lua -r capture.pcap -Y lynx
--   or copy it into Wireshark's folder for personal Lua plugins (Help, About, Folders).
--
-- Streams are found by the magic of their first frame, on any port. Wireshark 3.6 or later.

local lynx = Proto("lynx", "lynxproto KV-cache transfer")

local HEADER = 64
local MAGIC = 0xab4c5958
local IGNORABLE = 0x8000
local DATA = 9

local TYPES = {
  [1] = "HELLO", [2] = "HELLO_ACK", [3] = "OPEN", [4] = "ACCEPT", [5] = "REJECT", [6] = "FETCH",
  [7] = "NOT_FOUND", [8] = "PLAN", [9] = "DATA", [10] = "RESULT", [11] = "END", [12] = "ACK", [13] = "NACK",
  [14] = "CREDIT", [15] = "RESUME", [16] = "CANCEL", [17] = "CLOSED", [18] = "URGENT", [19] = "PING",
  [20] = "PONG", [21] = "ERROR", [22] = "GOAWAY",
}
local PARTS = { [0] = "key", [1] = "value", [2] = "packed-kv", [3] = "latent", [4] = "opaque" }
local CODECS = { [1] = "raw", [2] = "bitplane", [3] = "hq" }

local f = {
  magic = ProtoField.uint32("lynx.magic", "Magic", base.HEX),
  version = ProtoField.uint8("lynx.version", "Version"),
  units = ProtoField.uint8("lynx.header_units", "Header length in units of 8 bytes"),
  type = ProtoField.uint16("lynx.type", "Type", base.DEC, TYPES),
  flags = ProtoField.uint16("lynx.flags", "Flags", base.HEX),
  flags_ignorable = ProtoField.uint16("lynx.flags.ignorable", "Ignorable", base.HEX, nil, 0x00ff),
  flags_critical = ProtoField.uint16("lynx.flags.critical", "Critical", base.HEX, nil, 0xff00),
  part = ProtoField.uint8("lynx.part", "Part", base.DEC, PARTS),
  level = ProtoField.uint8("lynx.level", "Level"),
  payload_length = ProtoField.uint32("lynx.payload_length", "Payload length"),
  transfer = ProtoField.bytes("lynx.transfer", "Transfer"),
  layer = ProtoField.uint16("lynx.layer", "Layer"),
  attempt = ProtoField.uint8("lynx.attempt", "Attempt"),
  reserved = ProtoField.uint8("lynx.reserved", "Reserved"),
  head_start = ProtoField.uint16("lynx.head_start", "First head"),
  heads = ProtoField.uint16("lynx.heads", "Heads"),
  token_start = ProtoField.uint32("lynx.token_start", "First token"),
  token_stop = ProtoField.uint32("lynx.token_stop", "Token after the last"),
  codec_id = ProtoField.uint16("lynx.codec_id", "Codec", base.DEC, CODECS),
  codec = ProtoField.uint16("lynx.codec", "Codec config"),
  extension_length = ProtoField.uint32("lynx.extension_length", "Extension length"),
  payload_crc = ProtoField.uint32("lynx.payload_crc", "CRC32C of the payload", base.HEX),
  header_crc = ProtoField.uint32("lynx.header_crc", "CRC32C of the header", base.HEX),
  bitmap = ProtoField.bytes("lynx.bitmap", "Token bitmap"),
  bitmap_crc = ProtoField.uint32("lynx.bitmap_crc", "CRC32C of the bitmap", base.HEX),
  payload = ProtoField.bytes("lynx.payload", "Payload"),
  checksum = ProtoField.string("lynx.checksum", "Checksums"),
}
lynx.fields = f

local e = {
  crc = ProtoExpert.new("lynx.crc.bad", "CRC32C does not match", expert.group.CHECKSUM, expert.severity.ERROR),
  framing = ProtoExpert.new("lynx.framing", "No frame begins here", expert.group.MALFORMED, expert.severity.ERROR),
  version = ProtoExpert.new("lynx.version.other", "Not version 1", expert.group.UNDECODED, expert.severity.WARN),
  critical = ProtoExpert.new("lynx.critical", "Unknown critical type or flag", expert.group.PROTOCOL,
                             expert.severity.ERROR),
}
lynx.experts = { e.crc, e.framing, e.version, e.critical }

lynx.prefs.payloads = Pref.bool("Verify checksums of payloads", true,
  "CRC32C in Lua is slow: a few MB a second. Checksums of headers are always verified.")

-- CRC32C (Castagnoli, reflected): invariants.md, 3. Wireshark brings BitOp up to Lua 5.2; Lua 5.3 has operators.
local bxor, rshift, band
if bit then
  bxor, rshift, band = bit.bxor, bit.rshift, bit.band
else
  bxor, rshift, band = load([[
    return function(a, b) return a ~ b end, function(a, n) return a >> n end, function(a, b) return a & b end]])()
end

local CRC = {}
for i = 0, 255 do
  local c = i
  for _ = 1, 8 do
    c = band(c, 1) == 1 and bxor(rshift(c, 1), 0x82f63b78) or rshift(c, 1)
  end
  CRC[i] = c
end

local function crc32c(range)
  local data = range:bytes():raw()
  local c = 0xffffffff
  for i = 1, #data do
    c = bxor(CRC[band(bxor(c, data:byte(i)), 0xff)], rshift(c, 8))
  end
  return bxor(c, 0xffffffff) % 0x100000000
end

local function check(tree, field, range, over)
  local item = tree:add_le(field, range)
  local right = range:le_uint() == crc32c(over)
  if right then
    item:append_text(" (right)")
  else
    item:add_proto_expert_info(e.crc, string.format("CRC32C does not match: it is 0x%08x", crc32c(over)))
  end
  return right
end

local function name_of(kind)
  return TYPES[kind] or string.format("type 0x%04x", kind)
end

local function header(tvb, tree)
  local kind, flags = tvb(6, 2):le_uint(), tvb(8, 2):le_uint()
  tree:add(f.magic, tvb(0, 4))
  tree:add(f.version, tvb(4, 1))
  tree:add(f.units, tvb(5, 1))
  local item = tree:add_le(f.type, tvb(6, 2))
  if not TYPES[kind] then
    if kind < IGNORABLE then
      item:add_proto_expert_info(e.critical)
    else
      item:append_text(kind % 31 == (IGNORABLE + 27) % 31 and " (grease, to be skipped)" or " (to be skipped)")
    end
  end
  local bits = tree:add_le(f.flags, tvb(8, 2))
  bits:add_le(f.flags_critical, tvb(8, 2))
  bits:add_le(f.flags_ignorable, tvb(8, 2))
  if flags > 0xff then bits:add_proto_expert_info(e.critical) end
  tree:add(f.part, tvb(10, 1))
  tree:add(f.level, tvb(11, 1))
  tree:add_le(f.payload_length, tvb(12, 4))
  tree:add(f.transfer, tvb(16, 16))
  tree:add_le(f.layer, tvb(32, 2))
  tree:add(f.attempt, tvb(34, 1))
  tree:add(f.reserved, tvb(35, 1))
  tree:add_le(f.head_start, tvb(36, 2))
  tree:add_le(f.heads, tvb(38, 2))
  tree:add_le(f.token_start, tvb(40, 4))
  tree:add_le(f.token_stop, tvb(44, 4))
  tree:add_le(f.codec_id, tvb(48, 2))
  tree:add_le(f.codec, tvb(50, 2))
  tree:add_le(f.extension_length, tvb(52, 4))
end

local function dissect_frame(tvb, pinfo, root)
  local units = tvb(5, 1):uint() * 8
  local kind, length, extension = tvb(6, 2):le_uint(), tvb(12, 4):le_uint(), tvb(52, 4):le_uint()
  local tree = root:add(lynx, tvb(), "lynxproto " .. name_of(kind))
  local info = name_of(kind)
  if kind == DATA then
    local first, stop = tvb(40, 4):le_uint(), tvb(44, 4):le_uint()
    info = string.format("DATA layer %d %s level %d tokens %d-%d", tvb(32, 2):le_uint(),
      PARTS[tvb(10, 1):uint()] or "?", tvb(11, 1):uint(), first, stop - 1)
    tree:append_text(string.format(", layer %d, %s, level %d, %d bytes", tvb(32, 2):le_uint(),
      PARTS[tvb(10, 1):uint()] or "?", tvb(11, 1):uint(), length))
  end
  if tvb(4, 1):uint() ~= 1 or units ~= HEADER then
    tree:add_proto_expert_info(e.version)
    pinfo.cols.info:append(" " .. info)
    return
  end
  header(tvb, tree)
  local right = true
  local payload = HEADER + extension
  if length > 0 and lynx.prefs.payloads then
    right = check(tree, f.payload_crc, tvb(56, 4), tvb(payload, length)) and right
  elseif length == 0 then
    tree:add_le(f.payload_crc, tvb(56, 4))
  else
    tree:add_le(f.payload_crc, tvb(56, 4)):append_text(" (not verified)")
  end
  right = check(tree, f.header_crc, tvb(60, 4), tvb(0, 60)) and right
  if extension > 4 then
    tree:add(f.bitmap, tvb(HEADER, extension - 4))
    right = check(tree, f.bitmap_crc, tvb(payload - 4, 4), tvb(HEADER, extension - 4)) and right
  end
  tree:add(f.checksum, right and "ok" or "bad"):set_generated()
  if length > 0 then
    local body = tree:add(f.payload, tvb(payload, length))
    if TYPES[kind] and kind ~= DATA then
      Dissector.get("cbor"):call(tvb(payload, length):tvb(), pinfo, body)
    end
  end
  pinfo.cols.protocol = "LYNX"
  pinfo.cols.info:append(" " .. info .. (right and "" or " [checksum]"))
end

local function frame_length(tvb, _, offset)
  return tvb(offset + 5, 1):uint() * 8 + tvb(offset + 12, 4):le_uint() + tvb(offset + 52, 4):le_uint()
end

function lynx.dissector(tvb, pinfo, root)
  pinfo.cols.protocol = "LYNX"
  pinfo.cols.info = ""
  if tvb:len() >= 4 and tvb(0, 4):uint() ~= MAGIC then
    root:add(lynx, tvb()):add_proto_expert_info(e.framing)
    return tvb:len()
  end
  dissect_tcp_pdus(tvb, root, HEADER, frame_length, function(frame, packet, tree)
    if frame:len() < HEADER or frame(0, 4):uint() ~= MAGIC then
      tree:add(lynx, frame()):add_proto_expert_info(e.framing)
    else
      dissect_frame(frame, packet, tree)
    end
    return frame:len()
  end)
  return tvb:len()
end

lynx:register_heuristic("tcp", function(tvb, pinfo, root)
  if tvb:len() < 6 or tvb(0, 4):uint() ~= MAGIC then return false end
  pinfo.conversation = lynx
  lynx.dissector(tvb, pinfo, root)
  return true
end)

-- For streams whose beginning was not caught: Decode As, or this port.
DissectorTable.get("tcp.port"):add(7411, lynx)
