meta:
  id: lynx
  title: lynxproto frames and captures, version 1
  license: Apache-2.0
  endian: le
  ks-version: '0.11'
doc: |
  A sequence of frames, as each direction of a stripe carries them (`lynx`), and capture files (type `capture`).
  Checksums are named and not verified: Kaitai Struct has no CRC32C. Payloads of control frames are CBOR (RFC 8949).
doc-ref: wire-format.md
seq:
  - id: frames
    type: frame
    repeat: eos
types:
  frame:
    doc-ref: wire-format.md, Frame header
    seq:
      - id: header
        type: header
      - id: extension
        type: extension
        size: header.extension_length
        if: header.extension_length != 0
      - id: payload
        size: header.payload_length
        type:
          switch-on: 'header.is_data ? header.codec_id : codec::none'
          cases:
            'codec::bitplane': bitplane_payload
            'codec::hq': hq_payload
  header:
    doc: The fixed 64 bytes.
    seq:
      - id: magic
        contents: [0xab, 0x4c, 0x59, 0x58]
      - id: version
        type: u1
        valid: 1
      - id: header_length
        type: u1
        valid: 8
        doc: in units of 8 bytes
      - id: type
        type: u2
        enum: frame_type
      - id: flags
        type: u2
        valid:
          max: 0xff
        doc: bits 8 to 15 are critical, and version 1 defines none
      - id: part
        type: u1
        enum: part
      - id: level
        type: u1
      - id: payload_length
        type: u4
      - id: transfer
        size: 16
      - id: layer
        type: u2
      - id: attempt
        type: u1
      - id: reserved
        type: u1
      - id: head_start
        type: u2
      - id: heads
        type: u2
      - id: token_start
        type: u4
      - id: token_stop
        type: u4
      - id: codec_id
        type: u2
        enum: codec
      - id: codec
        type: u2
        doc: index into the manifest's codecs
      - id: extension_length
        type: u4
      - id: payload_crc
        type: u4
      - id: header_crc
        type: u4
    instances:
      type_number:
        value: type.to_i
      is_data:
        value: type == frame_type::data
      is_known:
        value: type_number >= 1 and type_number <= 22
      is_ignorable:
        value: type_number >= 0x8000
        doc: a reader that does not know the type skips the frame; otherwise it must end the session
      is_grease:
        value: type_number >= 0x8000 and (type_number - 0x8000) % 31 == 27
  extension:
    doc: The token set of a DATA frame that is not a range.
    seq:
      - id: bitmap
        size: _parent.header.extension_length - 4
        doc: bit i (least significant first) of byte j stands for token token_start + 8 j + i
      - id: bitmap_crc
        type: u4
  bitplane_payload:
    doc-ref: codec-bitplane.md
    seq:
      - id: level
        type: u1
      - id: num_planes
        type: u1
      - id: reserved
        type: u2
      - id: planes
        size-eos: true
  hq_payload:
    doc-ref: codec-hq.md, Payloads
    seq:
      - id: mode
        type: u1
        enum: hq_mode
      - id: level
        type: u1
      - id: reserved
        type: u2
      - id: variable_size
        type: u4
        doc: bytes of the section of variable size
      - id: sections
        size-eos: true
  capture:
    doc-ref: capture.md
    seq:
      - id: header
        type: capture_header
      - id: records
        type: record
        repeat: eos
  capture_header:
    seq:
      - id: magic
        contents: [0x89, 0x4c, 0x59, 0x4e, 0x58, 0x0d, 0x0a, 0x1a]
      - id: version
        type: u2
        valid: 1
      - id: header_length
        type: u2
        valid: 32
      - id: flags
        type: u4
        valid: 0
      - id: start
        type: u8
        doc: nanoseconds since 1970-01-01 00:00 UTC
      - id: reserved
        type: u4
      - id: header_crc
        type: u4
  record:
    seq:
      - id: length
        type: u4
      - id: kind
        type: u1
        enum: record_kind
      - id: direction
        type: u1
        enum: direction
        valid:
          in-enum: true
      - id: reserved
        type: u2
      - id: time
        type: u8
        doc: nanoseconds since the header's start
      - id: stripe
        type: u4
      - id: header_crc
        type: u4
      - id: data
        size: length
enums:
  frame_type:
    1: hello
    2: hello_ack
    3: open
    4: accept
    5: reject
    6: fetch
    7: not_found
    8: plan
    9: data
    10: result
    11: end
    12: ack
    13: nack
    14: credit
    15: resume
    16: cancel
    17: closed
    18: urgent
    19: ping
    20: pong
    21: error
    22: goaway
  part:
    0: key
    1: value
    2: packed_kv
    3: latent
    4: opaque
  codec:
    0: none
    1: raw
    2: bitplane
    3: hq
  hq_mode:
    0: coded
    1: stored
  record_kind:
    0: data
    1: opened
    2: closed
  direction:
    0: to_server
    1: to_client
