"""The job that a request names: found, answered with, and held against the version that its caller knows."""

import re
from uuid import UUID

from starlette.datastructures import Headers

from clarion.api.operation import Reply
from clarion.api.representations import job_out
from clarion.api.requests import uuid_in_path
from clarion.errors import NotFound
from clarion.job import Job
from clarion.store import Store

_ETAG = re.compile(r'(W/)?("[^"]*")')


def job_id_in(path_part: str) -> UUID:
    """The id that a path names; raises NotFound for what is none."""
    job_id = uuid_in_path(path_part)
    if job_id is None:
        raise NotFound("there is no job with this id: ids of jobs are UUIDs")
    return job_id


async def find_job(store: Store, job_id: UUID) -> Job:
    """The job as it is now; raises NotFound."""
    job = await store.get_job(job_id)
    if job is None:
        raise NotFound("there is no job with this id")
    return job


def job_reply(job: Job) -> Reply:
    """The job whole, and its version as the ETag."""
    return Reply(job_out(job), {"ETag": etag_of(job)})


def etag_of(job: Job) -> str:
    """Changes with every write of the job."""
    return f'"{job.version}"'


def names_version(headers: Headers, name: str, job: Job, *, weak: bool = False) -> bool:
    """Whether the header `If-Match`, or with `weak` comparison `If-None-Match`, names the job's version (RFC 9110)."""
    given = ", ".join(headers.getlist(name))
    tags = {tag for weakness, tag in _ETAG.findall(given) if weak or not weakness}
    return given.strip() == "*" or etag_of(job) in tags
