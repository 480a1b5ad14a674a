"""Requests over HTTP that are right but for something deep inside them."""

from __future__ import annotations

import base64
import io
import json
import struct
from typing import Any

import numpy as np
import soundfile
from hypothesis import strategies as st
from PIL import Image

from tests.fuzz.sent import Sent
from tests.fuzz.values import VALUES, damaged, mutated, written

Draw = st.DrawFn

JSON, SAFETENSORS = "application/json", "application/x-safetensors"
SIZES = {"F32": 4, "F16": 2, "BF16": 2, "BOOL": 1, "F64": 8, "I64": 8, "U8": 1, "F8_E4M3": 1, "f32": 4, "": 1}
# numbers of four bytes: ones, NaN with a payload, a signalling NaN, infinities, the largest, subnormal, minus zero
PAYLOADS = ("0000803f", "0100c07f", "0100807f", "0000807f", "000080ff", "ffff7f7f", "01000000", "00000080")
SENTENCES = (
    "the animal did not cross the street",
    "it was tired",
    "a",
    "",
    " ",
    "\u0301" * 9,
    "\0",
    "\ud800",
    "😀 tired",
)
OPTIONS: dict[str, list[Any]] = {
    "is_causal": [True, "true", 1, 2],
    "causal_alignment": ["top_left", 0, -5, 2**40, 2**63, 10**30, True, "1", 1.0],
    "window": [[0, 0], [-1, 2], [2**62, 2**63], [2**64, 10**30], [1], "1,1", [True, False], [1.5, 1]],
    "kv_lengths": [[1], [0], [2**62], [2**64], [], [1, 1], [-1], ["1"]],
    "scale": [1e-45, 1e38, 1e308, "0.5", 0, True, 5e-324],
    "softcap": [1e-45, 1e-30, 1e38, 1e308, 50, "50", False],
    "mode": ["dense", "chunked", "sparse", "fast", None],
    "max_error": [0, 1, 1e-320, 1.0000001, "0.1", True],
    "audit_rows": [59, 459, 60, "59", 59.0],
    "returns": [
        ["lse"],
        ["weights", "output"],
        ["top_weights"],
        ["block_map", "certificate"],
        [],
        ["output"] * 50,
        "lse",
    ],
    "rows": [[0], [-1], [2**62], [2**64, 0], [], [0, 0, 0], ["0"]],
    "top_k": [1, 1024, 1025, "3", 2.0, True],
    "stage": ["raw", "capped", "masked", "softmax", ""],
    "priority": ["batch", 1, "interactive", "urgent"],
    "timeout_s": [30, "30", 1e308, 1e-300, True, 0],
    "truncate": ["end", "chunk", "error", None],
    "chunk_overlap": [0, 1, 4096, "1", 63, 64],
    "layer_errors": [True, "yes"],
    "dimensions": [1, 32, 33, 2**63, "8", 2**70],
    "prompt_name": ["query", "none", "", "\ud800"],
    "input_type": ["query", "document"],
    "encoding_format": ["base64", "float", None, "hex"],
    "user": ["me", 1, None],
    "raw_scores": [True, 0],
    "top_n": [1, "1", 2**70, 1.0, 1.5, 0],
    "return_documents": [True, "false"],
    "positions": [[0], [-1], [2**70], [0] * 4097, ["0"]],
    "token_logprobs": [False],
    "layer": [0, -1, 3, 2**70],
    "layers": [[0], [-1, 2], [2**70], [], [0] * 257],
    "rollout": [True],
    "block_map": [True],
}
ATTENTION = (
    *("is_causal", "causal_alignment", "window", "kv_lengths", "scale", "softcap", "mode", "max_error", "audit_rows"),
    *("returns", "rows", "top_k", "stage", "priority", "timeout_s"),
)
FORWARD = ("truncate", "chunk_overlap", "mode", "max_error", "layer_errors", "priority", "timeout_s")


@st.composite
def options(draw: Draw, names: tuple[str, ...], most: int = 3) -> dict[str, Any]:
    chosen = draw(st.lists(st.sampled_from(names), max_size=most, unique=True))
    odd = draw(st.integers(0, 11))  # the place of a value that has nothing to do with its option
    return {name: draw(VALUES if at == odd else st.sampled_from(OPTIONS[name])) for at, name in enumerate(chosen)}


@st.composite
def shapes(draw: Draw) -> dict[str, list[int]]:
    """Of query, key, value and sometimes a mask, with at most one size that does not fit."""
    heads, groups = draw(st.sampled_from(((1, 1), (2, 1), (4, 2), (3, 3))))
    rows, keys, width, batch = (draw(st.integers(1, most)) for most in (4, 6, 5, 2))
    found = {
        "query": [batch, heads, rows, width],
        "key": [batch, groups, keys, width],
        "value": [batch, groups, keys, draw(st.sampled_from((width, 1, 3)))],
    }
    if draw(st.booleans()):
        found["attn_mask"] = [draw(st.sampled_from((1, batch))), draw(st.sampled_from((1, heads))), rows, keys]
    if batch == 1 and draw(st.booleans()):
        found = {name: shape[1:] for name, shape in found.items()}
    if draw(st.integers(0, 5)) == 0:
        shape = found[draw(st.sampled_from(sorted(found)))]
        shape[draw(st.integers(0, len(shape) - 1))] = draw(st.sampled_from((0, 1, 7, 2)))
    return found


@st.composite
def headers(draw: Draw, kind: str) -> tuple[tuple[str, str], ...]:
    found = [
        ("content-type", draw(st.sampled_from((kind,) * 12 + (f"{kind}; charset=utf-8", kind.upper(), "", "a/b"))))
    ]
    extra = draw(st.sampled_from((*(None,) * 8, *range(len(EXTRA)))))
    return (*found, *(() if extra is None else (EXTRA[extra],)))


EXTRA = (
    ("accept", SAFETENSORS),
    ("accept", "*/*;q=0.1, text/html"),
    ("x-dry-run", "TRUE"),
    ("x-dry-run", "1"),
    ("x-request-id", "mine-1"),
    ("x-request-id", "a b"),
    ("x-request-id", "x" * 129),
    ("x-request-timeout-seconds", "30"),
    ("x-request-timeout-seconds", "nan"),
    ("x-request-timeout-seconds", "1_0"),
    ("x-request-timeout-seconds", "1e-9"),
    ("content-encoding", "gzip"),
    ("traceparent", "00-" + "0" * 32 + "-" + "f" * 16 + "-01"),
    ("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-ff"),
    ("tracestate", "=,=,;" * 100),
    ("authorization", "Bearer é"),
    ("inference-header-content-length", "12"),
    ("expect", "100-continue"),
)


def filled(shape: list[int], number: Any) -> Any:
    """Nested lists; the last one shows `number` first."""
    if len(shape) == 1:
        return [number, *([0.25] * (shape[0] - 1))][: shape[0]]
    return [filled(shape[1:], number) for _ in range(shape[0])]


@st.composite
def attention_lists(draw: Draw) -> Sent:
    number = draw(st.sampled_from((1.0, 1, -2, 1e38, 3e38, 1e-320, 0)))
    body: Any = {name: filled(shape, number) for name, shape in draw(shapes()).items()}
    if "attn_mask" in body:
        body["attn_mask"] = filled(
            [len(body["attn_mask"]), *np.array(body["attn_mask"]).shape[1:]], draw(st.sampled_from((True, 0.5)))
        )
        if draw(st.booleans()):
            body["attn_mask"] = json.loads(
                json.dumps(body["attn_mask"]).replace("0.25", "false").replace("0.5", "true")
            )
    body |= draw(options(ATTENTION))
    return Sent("attention lists", "POST", "/v1/attention", draw(headers(JSON)), written(draw(mutated(body))))


@st.composite
def numbers(draw: Draw, count: int, itemsize: int, *, is_bool: bool = False) -> bytes:
    """Raw numbers, one in some of them of a strange kind."""
    if is_bool:
        return bytes(draw(st.sampled_from((0, 1, 1, 2)) if at == 0 else st.just(1)) for at in range(count))
    unit = bytes.fromhex({4: "0000803f", 2: "803f", 8: "000000000000f03f", 1: "01"}[itemsize])
    odd = bytes.fromhex(draw(st.sampled_from(PAYLOADS)))
    odd = odd[-itemsize:] if itemsize < 4 else odd * (itemsize // 4)
    return (odd + unit * count)[: count * itemsize] if draw(st.integers(0, 3)) == 0 else unit * count


@st.composite
def attention_base64(draw: Draw) -> Sent:
    dtype = draw(st.sampled_from(("float32", "float32", "float16", "bfloat16", "float64", "FLOAT32", "bool")))
    body: Any = {}
    for name, shape in draw(shapes()).items():
        size = {"float32": 4, "bool": 1}.get(dtype, 2)
        raw = draw(numbers(int(np.prod(shape)), size, is_bool=dtype == "bool"))
        body[name] = {"dtype": dtype, "shape": shape, "data": base64.b64encode(raw).decode()}
    body |= draw(options(ATTENTION))
    return Sent("attention base64", "POST", "/v1/attention", draw(headers(JSON)), written(draw(mutated(body))))


@st.composite
def safetensors(draw: Draw) -> Sent:
    """A file whose header is mutated and whose data may hold strange numbers."""
    dtype = draw(
        st.sampled_from(("F32", "F32", "F32", "F16", "BF16", "BOOL", "F64", "I64", "U8", "F8_E4M3", "f32", ""))
    )
    header, data = {}, b""
    for name, shape in draw(shapes()).items():
        kind = "BOOL" if name == "attn_mask" and draw(st.booleans()) else dtype
        raw = draw(numbers(int(np.prod(shape)), SIZES[kind], is_bool=kind == "BOOL"))
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = written(draw(mutated(draw(options(ATTENTION)), 1))).decode()
    header["__metadata__"] = {"options": text}
    head = written(draw(mutated(header, draw(st.sampled_from((0, 0, 0, 1, 2))))))
    head += b" " * draw(st.integers(0, 8))
    size = draw(st.sampled_from((*(len(head),) * 12, 0, 2**63, 2**20 + 1, len(head) - 1)))
    body = struct.pack("<Q", size) + head + draw(damaged(data, 1))
    return Sent("attention safetensors", "POST", "/v1/attention", draw(headers(SAFETENSORS)), body)


# -- models: named as the fixture of the fuzzer serves them -------------------------------------------------------


def image(kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(size[0] * size[1] * 3, dtype=np.uint32).astype(np.uint8).reshape(*size, 3)).save(
        file, kind
    )
    return file.getvalue()


def sound(kind: str = "WAV", subtype: str = "PCM_16", rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(rate // 4) / 9).astype(np.float32), rate, format=kind, subtype=subtype)
    return file.getvalue()


IMAGES = [image(), image("JPEG"), image("WEBP"), image("PNG", (1, 1)), image("PNG", (300, 2)), image("GIF")]
SOUNDS = [sound(), sound("FLAC"), sound("WAV", "FLOAT", 44_100), sound("WAV", "DOUBLE"), sound("WAV", "ULAW", 8_000)]
FILES = {"images": IMAGES, "audio": SOUNDS}
MODELS = {"images": "vision-embed", "audio": "whisper"}


def as_text(data: bytes) -> str:
    return base64.b64encode(data).decode()


TEXT_BODIES: dict[str, tuple[list[dict[str, Any]], tuple[str, ...]]] = {
    "/v1/embeddings": (
        [
            {"model": "embedder", "input": "it was tired"},
            {"model": "embedder", "input": list(SENTENCES[:2])},
            {"model": "embedder", "input": [5, 6, 7]},
            {"model": "embedder", "input": [[5, 6], [7]]},
            {"model": "embedder", "input": "long " * 90},
        ],
        (*FORWARD, "dimensions", "prompt_name", "input_type", "encoding_format", "user"),
    ),
    "/v1/classify": ([{"model": "classifier", "input": list(SENTENCES[:2])}], (*FORWARD, "raw_scores")),
    "/v1/rerank": (
        [{"model": "ranker", "query": "tired", "documents": ["it was tired", {"text": "the street", "id": 5}]}],
        (*FORWARD, "raw_scores", "top_n", "return_documents"),
    ),
    "/v1/score": (
        [
            {"model": "decoder", "input": "the animal was tired"},
            {"model": "decoder", "input": [[5, 6, 7], [8, 9]]},
            {"model": "translator", "source": ["the animal"], "target": ["was tired"]},
        ],
        (*FORWARD, "top_k", "positions", "token_logprobs"),
    ),
    "/v1/explain": (
        [
            {"model": "embedder", "text": "the animal was tired", "query": "tired"},
            {"model": "decoder", "text": "the animal was tired", "query": -1},
        ],
        (*FORWARD, "top_k", "layers", "rollout", "block_map"),
    ),
}
SHAPE = {"batch": 2, "heads": 4, "kv_heads": 2, "query_length": 512, "head_dim": 16, "window": [4, 4], "mode": "auto"}


@st.composite
def text_body(draw: Draw) -> tuple[str, Any]:
    path = draw(st.sampled_from(sorted(TEXT_BODIES)))
    bodies, names = TEXT_BODIES[path]
    body = {**draw(st.sampled_from(bodies)), **draw(options(names))}
    if "input" in body and draw(st.integers(0, 3)) == 0:
        body["input"] = [draw(st.sampled_from(SENTENCES)) for _ in range(draw(st.integers(1, 4)))]
    return path, draw(mutated(body))


@st.composite
def texts(draw: Draw) -> Sent:
    path, body = draw(text_body())
    return Sent("text tasks", "POST", path, draw(headers(JSON)), written(body))


@st.composite
def estimates(draw: Draw) -> Sent:
    if draw(st.booleans()):
        body: Any = {
            "attention": draw(mutated({**SHAPE, **draw(options(("window", "is_causal", "mode", "max_error")))}))
        }
    else:
        path, inner = draw(text_body())
        body = {"endpoint": path, "request": inner}
    return Sent("estimate", "POST", "/v1/estimate", draw(headers(JSON)), written(draw(mutated(body, 1))))


@st.composite
def files(draw: Draw, most: int = 3) -> tuple[str, list[bytes]]:
    name = draw(st.sampled_from(sorted(FILES)))
    given = draw(st.lists(st.sampled_from(FILES[name]), min_size=1, max_size=2))
    return name, [draw(damaged(data, draw(st.sampled_from((0, 1, most))))) for data in given]


@st.composite
def encoded_files(draw: Draw) -> Sent:
    """Images and audio in JSON, damaged inside."""
    name, given = draw(files())
    prefix = draw(st.sampled_from(("", "", "data:image/png;base64,", "DATA:;base64,", "data:,", "https://")))
    body: Any = {"model": MODELS[name], name: [prefix + as_text(data) for data in given], **draw(options(FORWARD, 1))}
    return Sent("files in JSON", "POST", "/v1/embeddings", draw(headers(JSON)), written(draw(mutated(body, 1))))


@st.composite
def forms(draw: Draw) -> Sent:
    """multipart/form-data with fields, files, strange headers, and sometimes damage between its parts."""
    name, given = draw(files(1))
    fields: Any = {"model": MODELS[name], **draw(options((*FORWARD, "dimensions", "encoding_format"), 2))}
    parts = [(f'form-data; name="{key}"', str(value).encode("utf-8", "surrogatepass")) for key, value in fields.items()]
    parts += [(f'form-data; name="{name}"; filename="a"', data) for data in given]
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(parts) - 1))
        wrong = (
            "form-data",
            'form-data; name=""',
            "form-data; name*=UTF-8''model",
            'form-data; name="é"',
            f'a; name="{name}"',
        )
        parts[at] = (draw(st.sampled_from(wrong)), parts[at][1])
    boundary, end = (
        draw(st.sampled_from(("b", "-" * 70, "a b", "'()+_,-./:=?"))),
        draw(st.sampled_from((*("--\r\n",) * 6, "", "--", "\r\n"))),
    )
    more = draw(
        st.sampled_from(
            (
                *("",) * 6,
                "Content-Type: text/plain; charset=utf-16\r\n",
                "Content-Transfer-Encoding: base64\r\n",
                "A: b\r\n" * 40,
            )
        )
    )
    body = b""
    for disposition, content in parts:
        body += f"--{boundary}\r\nContent-Disposition: {disposition}\r\n{more}\r\n".encode() + content + b"\r\n"
    body += f"--{boundary}{end}".encode()
    kind = f'multipart/form-data; boundary="{boundary}"'
    kind = draw(st.sampled_from((*(kind,) * 10, "multipart/form-data", "multipart/form-data; boundary=")))
    if draw(st.integers(0, 5)) == 0:
        body = draw(damaged(body, 2))
    return Sent("multipart forms", "POST", "/v1/embeddings", (("content-type", kind),), body)


# -- Open Inference Protocol --------------------------------------------------------------------------------------

RAW_TYPES = {"FP32": 4, "FP16": 2, "BF16": 2, "FP64": 8, "INT64": 8, "INT32": 4, "BOOL": 1}


@st.composite
def infer_inputs(draw: Draw) -> tuple[str, list[dict[str, Any]], list[bytes]]:
    """A model, its inputs without their data, and the raw data of each."""
    model = draw(st.sampled_from(("attention", "attention", "embedder", "classifier", "ranker", "decoder", "whisper")))
    inputs, data = [], []

    def add(name: str, datatype: str, shape: list[int], raw: bytes) -> None:
        inputs.append({"name": name, "datatype": datatype, "shape": shape})
        data.append(raw)

    if model == "attention":
        datatype = draw(st.sampled_from(("FP32", "FP32", "FP16", "BF16", "FP64", "INT64")))
        for name, shape in draw(shapes()).items():
            kind = "BOOL" if name == "attn_mask" else datatype
            add(name, kind, shape, draw(numbers(int(np.prod(shape)), RAW_TYPES[kind], is_bool=kind == "BOOL")))
    elif model == "whisper":
        frames = draw(st.sampled_from((200, 199, 1)))
        add("input_features", "FP32", [1, 16, frames], draw(numbers(16 * frames, 4)))
    elif draw(st.booleans()):
        rows, length = draw(st.integers(1, 2)), draw(st.integers(1, 4))
        ids = draw(
            st.lists(st.sampled_from((5, 6, 7, 127, 0, -1, 128, 2**40)), min_size=rows * length, max_size=rows * length)
        )
        add("input_ids", "INT64", [rows, length], np.array(ids, np.int64).tobytes())
        if draw(st.booleans()):
            marks = draw(st.lists(st.sampled_from((1, 1, 1, 0, 2)), min_size=rows * length, max_size=rows * length))
            add("attention_mask", "INT64", [rows, length], np.array(marks, np.int64).tobytes())
    else:
        for name in ("text", "query") if model == "ranker" else ("text",):
            strings = [
                draw(st.sampled_from(SENTENCES)).encode("utf-8", "surrogatepass")
                for _ in range(draw(st.integers(1, 2)))
            ]
            add(name, "BYTES", [len(strings)], b"".join(struct.pack("<I", len(one)) + one for one in strings))
    return model, inputs, data


def as_list(datatype: str, shape: list[int], raw: bytes) -> Any:
    """The JSON form of raw data, NaN and all; None of types that have none."""
    if datatype == "BYTES":
        found, at = [], 0
        while at < len(raw):
            (size,) = struct.unpack_from("<I", raw, at)
            found.append(raw[at + 4 : at + 4 + size].decode("utf-8", "replace"))
            at += 4 + size
        return found
    name = {"FP32": "<f4", "FP64": "<f8", "INT64": "<i8", "INT32": "<i4", "BOOL": "u1", "FP16": "<f2", "BF16": "<u2"}[
        datatype
    ]
    values = np.frombuffer(raw, name).tolist()
    return [bool(value) for value in values] if datatype == "BOOL" else values


@st.composite
def infer_parameters(draw: Draw) -> dict[str, Any]:
    found = draw(options((*ATTENTION, *FORWARD, "layer"), 2)) if draw(st.integers(0, 2)) == 0 else {}
    strange: dict[str, list[Any]] = {
        "binary_data_output": [True, 1],
        "timeout": [10**9, -1, 2**80, True, "5"],
        "priority": [0, 1, 2, True, 2**70],
        "sequence_id": [0, 5, "", "x", [], {}],
        "returns": ['["lse"]', "[", '"lse"', "1" * 5000, "[" * 5000],
    }
    for name in draw(st.lists(st.sampled_from(sorted(strange)), max_size=1)):
        found[name] = draw(st.sampled_from(strange[name]))
    return found


@st.composite
def infer(draw: Draw) -> Sent:
    """JSON, or JSON with binary tensors after it."""
    model, inputs, data = draw(infer_inputs())
    document: dict[str, Any] = {"id": draw(st.sampled_from(("1", "", "é", "\ud800", "x" * 500))), "inputs": inputs}
    if parameters := draw(infer_parameters()):
        document["parameters"] = parameters
    wanted = draw(
        st.sampled_from((None, None, None, "output", "lse", "embedding", "hidden_states", "scores", "top_weights"))
    )
    if wanted is not None:
        document["outputs"] = [{"name": wanted, "parameters": {"binary_data": draw(st.booleans())}}]
    is_binary, raw = draw(st.booleans()), b""
    for entry, content in zip(inputs, data, strict=True):
        if is_binary:
            entry["parameters"] = {"binary_data_size": len(content)}
            raw += content
        else:
            entry["data"] = as_list(entry["datatype"], entry["shape"], content)
    head = written(draw(mutated(document, draw(st.sampled_from((0, 1, 2))))))
    found = list(draw(headers("application/octet-stream" if is_binary else JSON)))
    if is_binary:
        size = draw(st.sampled_from((*(len(head),) * 12, len(head) + 1, 0, "x", 10**13, "１２")))
        found.append(("inference-header-content-length", str(size)))
        raw = draw(damaged(raw, draw(st.sampled_from((0, 0, 1)))))
    version = draw(st.sampled_from(("",) * 8 + ("/versions/1", "/versions/2", "/versions/")))
    return Sent("infer", "POST", f"/v2/models/{model}{version}/infer", tuple(found), head + raw)


@st.composite
def lines(draw: Draw) -> Sent:
    """Requests that are strange outside of their bodies: paths, queries, methods."""
    paths = (
        "/v1/usage",
        "/v1/models",
        "/v2",
        "/v2/health/ready",
        "/v2/models/embedder",
        "/readyz",
        "/healthz",
        "/openapi.json",
    )
    paths += (
        "/metrics",
        "/docs",
        "/v2/models/attention/versions/1",
        "/v2/repository/index",
        "/v2/repository/models/no/load",
    )
    path = draw(st.sampled_from(paths)) + draw(
        st.sampled_from(("",) * 6 + ("/", "/\0", "/é", "//", "/../x", "/" + "y" * 9000))
    )
    query = ""
    if draw(st.booleans()):
        moments = (
            "0",
            "-1",
            "1e308",
            "nan",
            "2026-01-01",
            "2026-01-01T00:00:00Z",
            "9999-12-31T23:59:59+23:59",
            "0001-01-01",
            "",
        )
        moments += ("99999999999999999", "2026-02-30", "\u0661", "%00", "253402300800", "-62135596801")
        pairs = draw(
            st.lists(
                st.tuples(
                    st.sampled_from(("from", "to", "group_by", "x", "from")),
                    st.sampled_from((*moments, "tenant", "model,model", "day,hour", "'", "a" * 5000)),
                ),
                max_size=3,
            )
        )
        query = "&".join(f"{name}={value}" for name, value in pairs)
    body = draw(st.sampled_from((b"", b"", b"{}", b'{"ready":true}', b'{"ready":1}', b"[]", b"\xff")))
    method = draw(st.sampled_from(("GET", "GET", "GET", "POST", "HEAD", "OPTIONS", "PUT", "BREW")))
    return Sent("paths and queries", method, path, draw(headers(JSON)), body, query)


TARGETS = {
    "attention lists": attention_lists(),
    "attention base64": attention_base64(),
    "attention safetensors": safetensors(),
    "text tasks": texts(),
    "estimate": estimates(),
    "files in JSON": encoded_files(),
    "multipart forms": forms(),
    "infer": infer(),
    "paths and queries": lines(),
}
