"""What HAProxy answers itself, and what it makes of Serve's own answers: the service's form, one request id in each.

Serve answers a timeout, an unknown route, a full queue and a drain in plain text, and HAProxy its own errors as pages.
"""

from __future__ import annotations

import json
import re

from service.errors import CODES, Kind, retry_after

RETRY_S = 1.0
DEFAULTS, HTTP_FRONTEND, GRPC_FRONTEND = "\ndefaults\n", "\nfrontend http_frontend\n", "\nfrontend grpc_frontend\n"
# Serve decodes these as UTF-8 before the service sees them, and answers 500 in plain text where they are not
DECODED_HEADERS = ("x-request-id", "x-request-timeout-seconds", "serve_multiplexed_model_id")
REQUEST_ID = "^[A-Za-z0-9._:/+=@-]{1,128}$"  # as the service accepts it
STARTING = "the service is starting, or changes its replicas"
# status that HAProxy or Serve gives in a form of its own: the failure that callers see, and its words
FOREIGN = {
    400: (Kind.MALFORMED, "the request is not valid HTTP, or did not arrive whole"),
    404: (Kind.NOT_FOUND, CODES[Kind.NOT_FOUND].meaning),
    408: (Kind.DEADLINE, CODES[Kind.DEADLINE].meaning),
    429: (Kind.OVERLOADED, "the service is full"),
    500: (Kind.INTERNAL, "internal error"),
    502: (Kind.UNAVAILABLE, "the replica did not finish its answer"),
    503: (Kind.UNAVAILABLE, STARTING),
    504: (Kind.DEADLINE, CODES[Kind.DEADLINE].meaning),
}
OWN = (400, 408, 500, 502, 503, 504)  # that HAProxy gives by itself, without a rule
# Ray's rules that answer: no application yet, a node that drains
RAYS_ANSWER = re.compile(r'return status (404|503) content-type text/plain (?:lf-)?string "[^"\n]*"')


def body(kind: Kind, message: str) -> str:
    """As `service.api.codec.error_document` has it, which needs torch."""
    error: dict[str, str | float | None] = {"message": message, "type": kind.value, "code": kind.value, "param": None}
    if CODES[kind].retryable:
        error["retry_after_s"] = RETRY_S
    return json.dumps({"error": error}, separators=(",", ":"))


def answered(text: str) -> str:
    """Ray's configuration with these answers."""
    text = re.sub(r"\n    errorfile 50\d [^\n]*", "", text)
    text = RAYS_ANSWER.sub(f"return {_reply(503)}", text)
    errors = "".join(f"    http-error status {status} {_content(status)}\n" for status in OWN)
    text = text.replace(DEFAULTS, DEFAULTS + errors, 1)
    text = text.replace(HTTP_FRONTEND, HTTP_FRONTEND + _identified() + _refusals() + _translated(), 1)
    return text.replace(GRPC_FRONTEND, GRPC_FRONTEND + _named_trailers(), 1)


def _content(status: int) -> str:
    kind, message = FOREIGN[status]
    after = f" hdr retry-after {retry_after(RETRY_S)}" if CODES[kind].retryable else ""
    return f"content-type application/json string '{body(kind, message)}'{after}"


def _reply(status: int) -> str:
    return f"status {CODES[FOREIGN[status][0]].http} {_content(status)}"


def _id_rules() -> str:
    """The caller's id if the service would accept it, else a new one."""
    return (
        "    http-request set-var(txn.request_id) req.fhdr(x-request-id,1)\n"
        f"    http-request set-var(txn.request_id) uuid() unless {{ var(txn.request_id) -m reg {REQUEST_ID} }}\n"
    )


def _identified() -> str:
    rules = _id_rules() + "    http-after-response set-header x-request-id %[var(txn.request_id)]\n"
    for status, (kind, _) in FOREIGN.items():  # its own 408 and 502, which an `http-error` cannot give another status
        if status != CODES[kind].http:
            rules += f"    http-after-response set-status {CODES[kind].http} if {{ status {status} }}\n"
    return rules


def _refusals() -> str:
    """400 for headers that Serve cannot decode; then Serve gets the id, too."""
    rules = ""
    for header in DECODED_HEADERS:
        error = body(Kind.MALFORMED, f"header {header}: expected printable ASCII")
        condition = f"{{ req.hdr({header}) -m reg '[^\\x20-\\x7e]' }}"
        rules += f"    http-request return status 400 content-type application/json string '{error}' if {condition}\n"
    return rules + "    http-request set-header x-request-id %[var(txn.request_id)]\n"


def _translated() -> str:
    """Errors that are not JSON are not the service's."""
    foreign = "!{ res.hdr(content-type) -m beg application/json }"
    rules = [f"    http-response return {_reply(status)} if {{ status {status} }} {foreign}\n" for status in FOREIGN]
    return "".join(rules)


def _named_trailers() -> str:
    """Statuses without a message, which Serve and HAProxy answer; the service puts its id into the trailers."""
    is_bare = "{ res.hdr(grpc-status) -m found } !{ res.hdr(x-request-id) -m found }"
    return _id_rules() + f"    http-after-response set-header x-request-id %[var(txn.request_id)] if {is_bare}\n"
