"""What went wrong with an S3 request, in words that hold no credentials.

Servers repeat what they were sent: an expired session token in `ExpiredToken`, the access key and the signed headers in
`SignatureDoesNotMatch`. So nothing of an error's own text is ever passed on; what is known to be harmless is picked
out of it: status, error code, number of retries, kind of connection failure. This module makes no requests.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_CREDENTIALS = (
    "they are taken from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_SESSION_TOKEN, or from the machine's role; "
    "profiles in ~/.aws are not read (`aws configure export-credentials --format env` prints one)"
)
_RENEW = f"the credentials have expired: renew them and run the same command again; {_CREDENTIALS}"
_WRONG = f"the credentials are not accepted: {_CREDENTIALS}"
_REGION = "the bucket is in another region: set AWS_REGION to it"
_NO_BUCKET = "there is no such bucket: make it, or correct its name or AWS_ENDPOINT_URL"
_HINTS = {
    "ExpiredToken": _RENEW,
    "ExpiredTokenException": _RENEW,
    "InvalidAccessKeyId": _WRONG,
    "InvalidToken": _WRONG,
    "SignatureDoesNotMatch": _WRONG,
    "AccessDenied": "access is denied: the bucket's policy must allow s3:ListBucket, s3:GetObject, s3:PutObject, "
    "s3:DeleteObject and s3:AbortMultipartUpload to these credentials",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
    "NoSuchBucket": _NO_BUCKET,
    "PermanentRedirect": _REGION,
    "AuthorizationHeaderMalformed": _REGION,
    "NotImplemented": "the server lacks what is needed: conditional writes (If-None-Match: *)",
}
_BY_STATUS = {
    301: _REGION,
    401: _WRONG,
    403: f"access is denied: check the credentials and what they allow; {_CREDENTIALS}",
    404: _NO_BUCKET,
    412: "another writer was there at the same time",
    501: _HINTS["NotImplemented"],
}
_CONNECTION = {
    "Connect": "the server cannot be reached: check the network and AWS_ENDPOINT_URL",
    "Timeout": "the server did not answer in time",
    "Interrupted": "the connection was broken",
}
_BROKEN_BODY = ("request or response body error", "UnexpectedRange")
_METADATA_SERVICE = ("169.254.", "fd00:ec2::", "latest/api/token", "security-credentials")


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What is known of a failed request."""

    status: int | None
    """Of the HTTP answer, if there was one."""
    code: str | None
    """S3's name for the error."""
    retries: int
    """How often obstore tried again."""
    connection: str | None
    """`Connect`, `Timeout` or `Interrupted`, if no whole answer came."""
    missing: bool
    """The answer was that there is no such object."""
    exists: bool
    """The answer was that there is one already, where none was to be."""
    no_credentials: bool
    """The request was for credentials, or was not made for want of them."""

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Pick what is harmless out of one of obstore's errors."""
        text = str(error)
        status = re.search(r"status code: (\d{3})\b", text)
        code = re.search(r"<Code>([A-Z][A-Za-z]{1,40})</Code>", text)
        retries = re.search(r"after (\d{1,4}) retries", text)
        connection = re.search(r"\bkind: (Connect|Timeout|Interrupted)\b", text)
        broken = any(sign in text for sign in _BROKEN_BODY)
        redirected = "redirect without LOCATION" in text
        request = text.partition(" - ")[0]
        return cls(
            status=int(status[1]) if status else 301 if redirected else None,
            code=code[1] if code else None,
            retries=int(retries[1]) if retries else 0,
            connection=connection[1] if connection else "Interrupted" if broken else None,
            missing=isinstance(error, FileNotFoundError) and not (code and code[1] == "NoSuchBucket"),
            exists=type(error).__name__ == "AlreadyExistsError",
            no_credentials=any(sign in request for sign in _METADATA_SERVICE)
            or re.search(r"\bMissing ?(SecretAccessKey|AccessKeyId)\b", text) is not None,
        )

    @property
    def worth_another_try(self) -> bool:
        """Tell whether no whole answer came, and obstore left it at that."""
        return self.status is None and self.connection is not None and self.retries == 0

    def to_error(self, url: str, deed: str, key: str) -> OSError | ValueError:
        """Return the error to raise: `url` is the store's; deed: read, write, create, delete or list."""
        if self.exists:
            return FileExistsError(f"{url}/{key} exists")
        if self.missing and deed in ("read", "delete"):
            return FileNotFoundError(f"{url}/{key} does not exist")
        if self.status == 416:
            return ValueError(f"{url}/{key} is cut short: it ends before what was to be read")
        what = f"{url}: cannot {deed} {key or 'it'}"
        tries = f" (tried {self.retries + 1} times)" if self.retries else ""
        if self.no_credentials:
            return PermissionError(f"{what}: there are no credentials: {_CREDENTIALS}")
        if self.status is not None:
            answer = f"the server answered {self.status}{f' {self.code}' if self.code else ''}{tries}"
            hint = _HINTS.get(self.code or "") or _BY_STATUS.get(
                self.status, "run the same command again later"
            )
            return (PermissionError if self.status in (401, 403) else OSError)(f"{what}: {answer}: {hint}")
        if self.connection is not None:
            kind = TimeoutError if self.connection == "Timeout" else ConnectionError
            return kind(f"{what}: {_CONNECTION[self.connection]}{tries}")
        return OSError(f"{what}: the request failed{tries}")
