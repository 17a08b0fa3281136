"""The held-out evaluations of a run: before training, on the way with their alarm, and after."""

import time

import numpy as np

from fastgrpo.core.errors import Exploded, Hacked, UserError
from fastgrpo.session.session import Session
from fastgrpo.training.evaluation import Evaluation, evaluate
from fastgrpo.training.evaluation.course import Alarm, Course, clean, write_alarms
from fastgrpo.training.evaluation.course import metrics as metrics_of


def baseline(session: Session) -> Evaluation:
    """The held-out evaluation before training, read from its file when the run is resumed."""
    if session.progress.iteration:
        return Evaluation.read(session.recipe.run.dir / "evaluation" / "step-0.json")
    session.tracker.message("evaluating the held-out prompts before training")
    return evaluate_now(session)


def evaluate_now(session: Session) -> Evaluation:
    """Evaluate the held-out prompts with the present weights."""
    session.ranks.heart.enter("evaluate")
    evaluation = evaluate(
        session.trainer,
        recipe=session.recipe,
        heldout=session.heldout.first(session.recipe.evaluate.prompts, session.world.device),
        scorer=session.scorer,
        iteration=session.progress.iteration,
        poll_before=session.stop.poll_before,
    )
    clips, lost = len(evaluation.prompts), evaluation.not_finite
    invalid = evaluation.missing("sum")
    if lost and session.progress.iteration and invalid == clips:
        raise Exploded(
            f"optimizer.lr={session.recipe.optimizer.lr:g}: the weights have exploded: {lost} of "
            f"{clips} held-out clips are not finite, and none has a score; lower it.",
            drawn=True,
        )
    for line in evaluation.shortfalls():
        session.tracker.message(line)
    if invalid == clips:
        raise UserError(
            f"rewards: no held-out clip has a valid score ({session.scorer.hint}); correct that."
        )
    return evaluation


def open_course(session: Session, before: Evaluation) -> Course:
    """The evaluations that the run has made so far, and the learning rate that follows."""
    recipe, done = session.recipe, session.progress.iteration
    for notice in session.world.on_main(lambda: clean(recipe, done)):
        session.tracker.message(notice)
    course = Course.read(recipe, before, done)
    session.progress.judge_by(bool(recipe.evaluate.every))
    session.trainer.lr_factor = course.lr_factor
    return course


def on_the_way(session: Session, course: Course) -> bool:
    """Evaluate where it is due after the iterations done, and heed the alarm.

    What was evaluated already, by an attempt that ended since, is not evaluated again.

    returns whether these iterations' weights are still the run's, which may have gone back
    """
    recipe, progress, done = session.recipe, session.progress, session.progress.iteration
    if not course.due(done):
        return True
    seconds = time.perf_counter()
    if done not in course.evaluations:
        course.add(evaluate_now(session))
    evaluation = course.evaluations[done]
    monitors = course.raised()
    if not session.tracker.has(done - 1, "heldout/sum"):
        own = {"evaluation/alarm": float(len(monitors))}
        own |= {"evaluation/seconds": time.perf_counter() - seconds}
        session.tracker.log(done - 1, metrics_of(course.before, evaluation) | own)
    if not course.finding(done).hacked and session.checkpoints.due(done, recipe.run.iterations):
        progress.note_heldout(float(np.nanmean(evaluation.columns()["sum"])), f"step-{done}")
    if monitors:
        heed(session, course, course.answer(monitors, done, progress.best))
    return session.progress.iteration == done


def heed(session: Session, course: Course, alarm: Alarm) -> None:
    """Say that the reward may be hacked, and end the run or go back where the recipe wants it."""
    recipe, best, what = session.recipe, session.progress.best, course.told(alarm)
    look = f"look at the clips in evaluation/step-{alarm.iteration}"
    if alarm.back_to is not None and best is not None:
        # first this: a kill before the alarm is noted leaves a run that comes to it again
        session.progress = session.checkpoints.go_back(session.trainer, best)
        session.trainer.lr_factor = alarm.lr_factor
        course.rewind(session.progress.iteration)
        session.world.on_main(lambda: clean(recipe, session.progress.iteration))
        session.tracker.rewind(session.progress.iteration)
        session.tracker.message(f"{what}; back to {best}, with {alarm.lr_factor:g} of the rate")
    if alarm.back_to is not None or alarm not in course.alarms:
        course.alarms.append(alarm)
        session.world.on_main(lambda: write_alarms(recipe.run.dir, course.alarms))
    if alarm.action == "warn":
        session.tracker.message(f"{what}; {look}")
    elif alarm.back_to is None:
        spent = f" {course.returns} times the run went back to the best checkpoint"
        why = f", and{spent if course.returns else ' no checkpoint is of before'}"
        raise Hacked(
            f"evaluate.alarm={alarm.action}: {what}{why if alarm.action == 'return' else ''}; {look} "
            "and change the rewards, or go on with evaluate.alarm=warn."
        )
