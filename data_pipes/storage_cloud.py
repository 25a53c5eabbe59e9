"""s3:// and gs:// as web addresses that storage_http.py reads: same checks, retries and time limits as for http.

botocore (extra `s3`) finds credentials, region and endpoint as every AWS tool does and signs an address; google-auth
(extra `gs`) finds Google's default credentials and gives a bearer token. Neither is needed for anonymous reads of
gs://. No secret stands in the config: credentials come from the environment alone.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from typing import Any
from urllib.parse import quote

import urllib3

from ringweave.data_pipes.storage_base import StorageOptions, redact
from ringweave.tokenizers.errors import DataError

#: Seconds that a signed address is good for, and after which a new one is made.
_SIGNED_S, _RENEW_S = 3600, 600
_GOOGLE = "https://storage.googleapis.com"
_VERSION = re.compile(r"\?(?:versionId|generation)=([^&?]+)\Z")
_SCOPE = "https://www.googleapis.com/auth/devstorage.read_only"


def _split(url: str) -> tuple[str, str, str]:
    """(bucket, key, version) of `s3://bucket/key?versionId=...` or `gs://bucket/key?generation=...`.

    The key is taken letter for letter, as the stores' own tools do: `%`, `#` and any other `?` belong to it.
    """
    rest, version = url.partition("://")[2], ""
    match = _VERSION.search(rest)
    if match is not None:
        rest, version = rest[: match.start()], match[1]
    bucket, _, key = rest.partition("/")
    return bucket.rpartition("@")[2], key, version


def _beside(url: str, suffix: str) -> str:
    """The object with `suffix` behind the key, in its newest version: versions are of one object only."""
    match = _VERSION.search(url)
    return (url if match is None else url[: match.start()]) + suffix


class S3Locator:
    """Signed addresses of an S3 object, made anew before they expire; follows the bucket to its region."""

    def __init__(self, url: str, options: StorageOptions) -> None:
        self.url, self.options = url, options
        self._region = options.s3_region
        self._signed: tuple[str, float] | None = None

    def request(self, *, fresh: bool) -> tuple[str, dict[str, str]]:
        if fresh or self._signed is None or self._signed[1] < time.monotonic():
            self._signed = (self._sign(), time.monotonic() + _RENEW_S)
        return self._signed[0], {}

    def learn(self, answer: urllib3.BaseHTTPResponse) -> bool:
        region = answer.headers.get("x-amz-bucket-region", "")
        if answer.status not in (301, 307, 400) or not region or region == self._region:
            return False
        self._region, self._signed = region, None
        return True

    def sibling(self, suffix: str) -> S3Locator:
        other = S3Locator(_beside(self.url, suffix), self.options)
        other._region = self._region
        return other

    def _sign(self) -> str:
        client = _s3_client(self.options.s3_endpoint, self._region, self.options.anonymous)
        bucket, key, version = _split(self.url)
        names = {"Bucket": bucket, "Key": key} | ({"VersionId": version} if version else {})
        from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped, unused-ignore]

        try:
            return str(client.generate_presigned_url("get_object", Params=names, ExpiresIn=_SIGNED_S))
        except BotoCoreError as error:
            fix = (
                "set AWS_PROFILE or the other usual AWS variables; for a public bucket, read it as anonymous"
            )
            why = redact(error)
            raise DataError("no credentials for s3", where=redact(self.url), why=why, fix=fix) from None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_signed": None}  # no signature leaves the process


@functools.lru_cache(maxsize=32)
def _s3_client(endpoint: str | None, region: str | None, anonymous: bool) -> Any:
    """botocore's client, used for signing only; it opens no connection, except to renew credentials."""
    try:
        import botocore  # type: ignore[import-untyped, unused-ignore]
        import botocore.config  # type: ignore[import-untyped, unused-ignore]
        import botocore.exceptions  # type: ignore[import-untyped, unused-ignore]
        import botocore.session  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise _missing("s3://", "botocore") from None
    options: dict[str, Any] = {"signature_version": botocore.UNSIGNED if anonymous else "s3v4"}
    if endpoint is not None:
        options["s3"] = {"addressing_style": "path"}
    try:
        session = botocore.session.get_session()
        usual = region or session.get_config_variable("region") or "us-east-1"
        return session.create_client(
            "s3", region_name=usual, endpoint_url=endpoint, config=botocore.config.Config(**options)
        )
    except (botocore.exceptions.BotoCoreError, ValueError) as error:
        fix = "check s3_endpoint, s3_region and the AWS variables of the environment"
        raise DataError("unusable s3 settings", why=redact(error), fix=fix) from None


class GsLocator:
    """The address of a Google Cloud Storage object, with a bearer token unless anonymous."""

    def __init__(self, url: str, options: StorageOptions) -> None:
        self.url, self.options = url, options

    def request(self, *, fresh: bool) -> tuple[str, dict[str, str]]:
        bucket, key, version = _split(self.url)
        base = (self.options.gs_endpoint or _GOOGLE).rstrip("/")
        url = f"{base}/{quote(bucket)}/{quote(key)}" + (f"?generation={quote(version)}" if version else "")
        if self.options.anonymous:
            return url, {}
        return url, {"Authorization": f"Bearer {_google_tokens().token(self.url)}"}

    def learn(self, answer: urllib3.BaseHTTPResponse) -> bool:
        return False

    def sibling(self, suffix: str) -> GsLocator:
        return GsLocator(_beside(self.url, suffix), self.options)


class _GoogleTokens:
    """Application default credentials of this process, renewed when they expire."""

    def __init__(self) -> None:
        try:
            import google.auth
            import google.auth.exceptions
            import google.auth.transport.urllib3
        except ImportError:
            raise _missing("gs://", "google-auth") from None
        self._errors = google.auth.exceptions.GoogleAuthError
        self._find = functools.partial(google.auth.default, scopes=[_SCOPE])
        self._http = google.auth.transport.urllib3.Request(urllib3.PoolManager(timeout=20.0))
        self._credentials: Any = None
        self._lock = threading.Lock()

    def token(self, url: str) -> str:
        with self._lock:
            try:
                if self._credentials is None:
                    self._credentials = self._find()[0]
                if not self._credentials.valid:
                    self._credentials.refresh(self._http)
            except self._errors as error:
                fix = (
                    "run `gcloud auth application-default login` or set GOOGLE_APPLICATION_CREDENTIALS; for a "
                    "public bucket, read it as anonymous"
                )
                why = redact(error)
                raise DataError("no credentials for gs", where=redact(url), why=why, fix=fix) from None
            return str(self._credentials.token)


@functools.lru_cache(maxsize=1)
def _google_tokens() -> _GoogleTokens:
    return _GoogleTokens()


def _missing(scheme: str, package: str) -> DataError:
    why = f"{scheme} needs the package {package}, which is not installed"
    fix = f"pip install {package}"
    return DataError(f"no reader for {scheme}", why=why, fix=fix)
