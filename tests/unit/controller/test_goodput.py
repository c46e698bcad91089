"""Goodput: the share of the pods' time that led to the result."""

from __future__ import annotations

from finetune.api.contract import Step
from tests.builders import Claim, Job, Pod
from tests.unit.controller.test_decide import decided, observe, prepared


def test_time_that_a_crash_undid_counts_against_it_and_queueing_does_not():
    job, running = prepared(), Pod("train").on("n").running(Step.TRAIN)
    job.with_status(decided(job, Claim(), Job("train"), running, after=1_000).status)
    crashed = Pod("train").on("n").failed(Step.TRAIN, 1)
    job.with_status(decided(job, Claim(), Job("train").failed(), crashed, after=1_100).status)
    assert observe(job).status.attempts.training_seconds == 100
    job.with_status(decided(job, Claim(), Job("train").failed(), crashed, after=2_000).status)
    second = Pod("train", 2).on("n").running(Step.TRAIN)
    job.with_status(decided(job, Claim(), Job("train", 2), second, after=3_000).status)
    done = Pod("train", 2).on("n").done(Step.TRAIN, steps=4, seconds=240.0).succeeded()
    status = decided(job, Claim(), Job("train", 2).complete(), done, after=3_300).status
    assert status.training.seconds == 240.0
    assert (status.attempts.training_seconds, status.attempts.goodput) == (400, 0.6)


def test_a_trainer_that_does_not_say_how_long_its_steps_took_has_none():
    job, running = prepared(), Pod("train").on("n").running(Step.TRAIN)
    job.with_status(decided(job, Claim(), Job("train"), running).status)
    done = Pod("train").on("n").done(Step.TRAIN, steps=4).succeeded()
    attempts = decided(job, Claim(), Job("train"), done, after=100).status.attempts
    assert (attempts.training_seconds, attempts.goodput) == (100, None)
