"""Checks of what jobs rely on: Ray, DeepSpeed with its compiled op, MLflow, S3."""

import contextlib
import os
import shutil
import sqlite3
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import psutil

from infra.doctor.check import CONNECT_SECONDS, Check, reachable, short
from infra.errors import without_password
from infra.tracking import TrackingConfig, tracking_uri


def check_ray() -> Iterator[Check]:
    address = os.environ.get("RAY_ADDRESS")
    if address and address not in {"local", "auto"}:
        yield reachable("ray", "RAY_ADDRESS", address, default_port=6379, start="ray start --head")
    elif address == "auto" and not _ray_processes():
        fix = "ray start --head, or unset RAY_ADDRESS for a Ray of our own"
        yield Check("ray", "fail", "RAY_ADDRESS=auto and no Ray runs here", fix)
    else:
        yield Check("ray", "ok", "RAY_ADDRESS is not set; jobs start a Ray of their own on this machine")
    yield from _leftover_ray_session()


def _leftover_ray_session() -> Iterator[Check]:
    """``auto`` joins the cluster that this file names; when that cluster is gone the file misleads."""
    temporary = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray"
    current = temporary / "ray_current_cluster"
    if not current.exists():
        return
    processes = _ray_processes()
    if processes:
        yield Check("ray session", "ok", f"{len(processes)} Ray processes of you run here, at {current.read_text()}")
    else:
        fix = f"ray stop, or rm {current}: a Ray that ended without cleaning up left it"
        yield Check("ray session", "warn", f"{current} names {current.read_text()}, which does not run", fix)


def _ray_processes() -> list[int]:
    mine = os.getuid()
    names = {"raylet", "gcs_server"}
    found = psutil.process_iter(["name", "uids", "status"])
    return [
        p.pid
        for p in found
        if p.info["name"] in names and p.info["uids"].real == mine and p.info["status"] != psutil.STATUS_ZOMBIE
    ]


def check_deepspeed() -> Iterator[Check]:
    import deepspeed
    from deepspeed.accelerator import get_accelerator

    from infra.extensions import extension_state

    launcher = shutil.which("deepspeed") or shutil.which("deepspeed", path=str(Path(sys.executable).parent))
    accelerator = get_accelerator().device_name()
    if launcher is None:
        yield Check("deepspeed", "fail", "its launcher is nowhere", "pip install -r requirements.lock")
    else:
        yield Check("deepspeed", "ok", f"{deepspeed.__version__}, accelerator {accelerator}, launcher {launcher}")
    state = extension_state()
    if state["stale"]:
        fix = f"rm {state['folder']}/lock, or python -m infra.extensions, which does that and builds"
        yield Check("deepspeed op", "fail", "a killed build left its lock: every run would wait for ever", fix)
    elif state["lock"]:
        yield Check("deepspeed op", "ok", f"pid {state['builders'][0]} builds it now")
    elif not state["used"]:
        yield Check("deepspeed op", "ok", "not used on this machine")
    elif not state["built"]:
        fix = "python -m infra.extensions (minutes, once); else the first training run does it"
        yield Check("deepspeed op", "warn", "the collectives for CPU are not compiled yet", fix)
    else:
        yield Check("deepspeed op", "ok", f"compiled: {state['folder']}")
    if accelerator == "cpu":
        if shutil.which("numactl"):
            yield Check("numactl", "ok", "there; --bind_cores_to_rank works")
        else:
            yield Check("numactl", "warn", "missing; --bind_cores_to_rank would crash", "apt-get install numactl")


def check_mlflow() -> Iterator[Check]:
    """The store that MLFLOW_TRACKING_URI names, or the SQLite file that runs use without it."""
    uri = tracking_uri(TrackingConfig())
    scheme = uri.split(":", 1)[0].lower() if ":" in uri else "file"
    if scheme in {"http", "https"}:
        yield _mlflow_server(uri)
    elif scheme == "sqlite":
        yield _mlflow_sqlite(Path(uri.removeprefix("sqlite:///").split("?")[0]))
    elif scheme == "file":
        fix = "MLFLOW_TRACKING_URI=sqlite:///mlflow.db, or the address of a server"
        yield Check("mlflow", "fail", f"{uri} is a file store, which MLflow refuses since 3.13", fix)
    else:
        yield reachable("mlflow", "MLFLOW_TRACKING_URI", uri, default_port=5432, start="the database server")


def _mlflow_server(uri: str) -> Check:
    shown = without_password(uri)
    fix = f"Start it (mlflow server --host ... --port ...), or correct MLFLOW_TRACKING_URI={shown}"
    try:
        with urllib.request.urlopen(_request(f"{uri.rstrip('/')}/health"), timeout=CONNECT_SECONDS) as answer:
            body = answer.read(64)
    except urllib.error.HTTPError as error:
        if error.code == 403:
            host = urllib.parse.urlsplit(uri).netloc.rpartition("@")[2]
            fix = f"If the server refuses this name of itself: mlflow server --allowed-hosts {host}"
        return Check("mlflow", "fail", f"{shown} answers {error.code} {error.reason}", fix)
    except (OSError, ValueError) as error:
        return Check("mlflow", "fail", f"{shown} does not answer: {short(error)}", fix)
    if body.strip() != b"OK":
        return Check("mlflow", "fail", f"{shown} answers, but not like MLflow", fix)
    return Check("mlflow", "ok", f"{shown} answers")


def _request(url: str) -> urllib.request.Request:
    """A request without the user and password that may stand in the address; /health wants neither."""
    parts = urllib.parse.urlsplit(url)
    return urllib.request.Request(parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl())


def _mlflow_sqlite(path: Path) -> Check:
    if not path.exists():
        parent = next(folder for folder in path.absolute().parents if folder.exists())
        if os.access(parent, os.W_OK):
            return Check("mlflow", "ok", f"{path} is made at first use")
        return Check("mlflow", "fail", f"{parent} is not writable", "Choose another place with MLFLOW_TRACKING_URI.")
    address = f"file:{urllib.parse.quote(str(path))}?mode=rw"
    try:
        with contextlib.closing(sqlite3.connect(address, uri=True, timeout=2.0)) as database:
            # A reserved lock is what a writer takes first; nothing is written.
            database.execute("BEGIN IMMEDIATE")
            database.rollback()
    except sqlite3.Error as error:
        fix = f"Check owner and mode of {path}; if another process holds it, wait or use an MLflow server"
        return Check("mlflow", "fail", f"{path} cannot be written: {error}", fix)
    if not os.access(path, os.W_OK):
        return Check("mlflow", "fail", f"{path} is read-only", f"chmod u+w {path}")
    return Check("mlflow", "ok", f"{path} is writable")


def check_s3(uri: str | None = None) -> Iterator[Check]:
    """Only where something asks for S3: a uri, an endpoint, or AWS credentials in the environment."""
    asked = uri or any(
        os.environ.get(name)
        for name in (
            "AWS_ENDPOINT_URL",
            "AWS_ENDPOINT_URL_S3",
            "AWS_ACCESS_KEY_ID",
            "AWS_PROFILE",
            "MLFLOW_S3_ENDPOINT_URL",
        )
    )
    if not asked:
        yield Check("s3", "ok", "not configured")
        return
    import boto3
    from botocore.config import Config as BotoConfig
    from botocore.exceptions import BotoCoreError, ClientError

    credentials_fix = "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, or an instance role"
    try:
        session = boto3.Session()
        credentials = session.get_credentials()
        if credentials is None:
            yield Check("s3 credentials", "fail", "none found", credentials_fix)
            return
        yield Check("s3 credentials", "ok", f"found by {credentials.method}")
        quick = BotoConfig(connect_timeout=CONNECT_SECONDS, read_timeout=5, retries={"total_max_attempts": 1})
        region = session.region_name or "us-east-1"
        client = session.client("s3", config=quick, region_name=region)
    except (BotoCoreError, ValueError) as error:
        yield Check("s3 credentials", "fail", short(error), credentials_fix)
        return
    where = without_password(client.meta.endpoint_url)
    bucket = urllib.parse.urlsplit(uri).netloc if uri else ""
    prefix = urllib.parse.urlsplit(uri).path.lstrip("/") if uri else ""
    try:
        if bucket:
            client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        else:
            client.list_buckets()
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code", "unknown")
        if code in {"AccessDenied", "403"} and not bucket:
            yield Check("s3", "ok", f"{where} answers (listing buckets is not allowed)")
            return
        fixes = {
            "NoSuchBucket": f"Create bucket {bucket!r} or correct its name.",
            "AccessDenied": f"The credentials may not list {uri}: grant s3:ListBucket and s3:GetObject on it.",
            "InvalidAccessKeyId": "The endpoint does not know AWS_ACCESS_KEY_ID.",
            "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID.",
            "RequestTimeTooSkewed": "Set this machine's clock.",
        }
        fix = fixes.get(code, "Check the endpoint, the region and the credentials.")
        yield Check("s3", "fail", f"{where} refuses: {code}", fix)
    except (BotoCoreError, OSError, ValueError) as error:
        fix = "Correct AWS_ENDPOINT_URL (scheme, host, port), or start the server it names."
        yield Check("s3", "fail", f"{where} does not answer: {short(error)}", fix)
    else:
        yield Check("s3", "ok", f"{where} answers" + (f", {uri} is listable" if bucket else ""))
