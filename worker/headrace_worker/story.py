"""A job's story in the worker, told as spans once it has ended.

Invariant: nothing is recorded per token; the engine notes a few times per job and the spans are
made from those after the fact, with their own start and end.
"""

from __future__ import annotations

from opentelemetry.trace import Span, Status, StatusCode

from headrace import telemetry
from headrace.types import NOT_MOVED, Finish, FinishReason, Job
from headrace_worker.results import JobStory


def open_span(job: Job, stream: str, entry: str, worker: str, now_ns: int) -> Span:
    """The CONSUMER span of a job that was just read from the worker's stream."""
    span = telemetry.consumer_span(f"process jobs {job.model}", job.trace, now_ns)
    span.set_attributes(
        {
            "messaging.destination.name": stream,
            "messaging.message.id": entry,
            "headrace.worker": worker,
            "headrace.job.id": job.id,
            "headrace.job.attempt": job.attempt,
            "headrace.job.resumed_tokens": len(job.logged),
            "headrace.job.moved_here": job.found_tokens != NOT_MOVED,
            "gen_ai.request.model": job.model,
            "gen_ai.usage.input_tokens": len(job.prompt),
        }
    )
    return span


def tell_story(span: Span, story: JobStory) -> None:
    """Tell the story of a job that moves under `span`, which its keeper ends."""
    if span.is_recording():
        _tell(span, story)


def close_span(span: Span, story: JobStory | None, finish: Finish, now_ns: int) -> None:
    """Tell the story under `span` and end it."""
    if not span.is_recording():
        return
    if story is not None:
        _tell(span, story)
    span.set_attribute("gen_ai.response.finish_reasons", [finish.reason.value])
    if finish.reason is FinishReason.ERROR:
        span.set_status(Status(StatusCode.ERROR, finish.error))
    span.end(now_ns)


def _tell(span: Span, story: JobStory) -> None:
    span.set_attributes(
        {
            "gen_ai.usage.output_tokens": story.output_tokens,
            "gen_ai.usage.cache_read.input_tokens": story.cached_local + story.cached_imported,
            "headrace.cache.local_tokens": story.cached_local,
            "headrace.cache.imported_tokens": story.cached_imported,
            "headrace.preemptions": story.preemptions,
            "headrace.speculation.guessed": story.guessed,
            "headrace.speculation.guessed_right": story.guessed_right,
            "headrace.grammar.forced": story.forced,
        }
    )
    tracer, parent = telemetry.tracer(), telemetry.under(span)
    if story.scheduled_ns:
        wait = tracer.start_span("engine queue", parent, start_time=story.added_ns)
        wait.end(story.scheduled_ns)
    if story.chunks:
        prefill = tracer.start_span("prefill", parent, start_time=story.chunks[0][1])
        prefill.set_attribute("headrace.prefill.chunks", len(story.chunks))
        prefill.set_attribute("headrace.prefill.tokens", sum(c[0] for c in story.chunks))
        for tokens, start_ns, end_ns in story.chunks:
            prefill.add_event(
                "chunk",
                {"tokens": tokens, "duration_ms": (end_ns - start_ns) / 1e6},
                timestamp=end_ns,
            )
        prefill.end(story.chunks[-1][2])
    if story.first_token_ns:
        decode = tracer.start_span("decode", parent, start_time=story.first_token_ns)
        decode.set_attribute("gen_ai.usage.output_tokens", story.output_tokens)
        decode.end(story.finished_ns)
