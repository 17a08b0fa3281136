"""Algorithm 1 of DanceGRPO, from a recipe to a trained policy: read `run`, then `iterate`.

Departures from the paper: advantages are clamped, invalid samples are left out, the optimizer steps
of an iteration see disjoint minibatches balanced over prompts, and all randomness is keyed so that
a run resumes exactly.
"""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from torch import Tensor

from fastgrpo.algorithm import selection
from fastgrpo.algorithm.advantages import combined_advantages
from fastgrpo.checkpoint import explosion, identity
from fastgrpo.checkpoint.provenance import record_provenance
from fastgrpo.core.config import Recipe
from fastgrpo.core.errors import Exploded, Hacked, UserError
from fastgrpo.core.files import nan_to_null, replace_text, sha256
from fastgrpo.core.policy import Condition
from fastgrpo.core.processes import OneRankError, rank
from fastgrpo.parallel.world import open_world
from fastgrpo.run.failures import alarms, lost_folder, out_of_memory
from fastgrpo.run.stopping import Stopped, answer, answer_mistake
from fastgrpo.run.stopwatch import Stopwatch
from fastgrpo.session import Session, claim, open_session
from fastgrpo.session.held_out import baseline, evaluate_now, on_the_way, open_course
from fastgrpo.tools.check.check import refuse
from fastgrpo.tools.preflight import checks, largest_batch
from fastgrpo.tools.preflight.finding import Parts
from fastgrpo.tools.report.ending import told
from fastgrpo.tools.report.live.on_the_way import ReportOnTheWay
from fastgrpo.tools.report.report import write_report
from fastgrpo.training import methods
from fastgrpo.training.evaluation import compare
from fastgrpo.training.evaluation.course import Course, log_clips
from fastgrpo.training.method import Experience
from fastgrpo.training.rollout import Dealing, Plan
from fastgrpo.training.scoring.differentiable import InProcessJudge
from fastgrpo.training.scoring.drawing import Rollouts
from fastgrpo.training.scoring.scorer import Scored, reward_metrics
from fastgrpo.training.scoring.scouts import Scouted, candidates, scout
from fastgrpo.training.scoring.sources import NoScores
from fastgrpo.training.scoring.validity import check_validity
from fastgrpo.training.update import update


def train(recipe: Recipe) -> dict[str, object] | None:
    """Run a recipe to its end, resuming where an earlier attempt stopped.

    Returns the summary, on every rank; None where the run was asked to stop, so that starting the
    run again goes on with it.
    """
    try:
        settings = recipe.distributed, recipe.run.deterministic
        with open_world(*settings) as world, ExitStack() as stack:
            world.on_main(lambda: refuse(recipe))
            found = not world.main or recipe.run.dir.exists()
            split, stop = claim(recipe, world, stack)
            stack.enter_context(told(recipe.run.dir, world.rank, found))
            try:
                with lost_folder.one_line(recipe.run.dir):
                    parts = open_session(recipe, world=world, stack=stack, split=split, stop=stop)
                    return run(parts)
            except OneRankError:  # closing the world may wait for the other ranks, for ever
                answer(recipe.run.dir, requeue=False)
                raise
    except UserError:  # also of the first lines: the job, started again, would end there again
        if rank() == 0:
            answer_mistake(recipe.run.dir)
        raise


def run(session: Session) -> dict[str, object] | None:
    """Check, evaluate, iterate, evaluate again.  returns the summary; None: asked to stop"""
    largest_batch.choose(session)
    more = " The newest checkpoint is intact: start again after the change."
    with out_of_memory.one_line(session.recipe, lambda: session.ranks.heart.phase, more):
        return _run(session)


def _run(session: Session) -> dict[str, object] | None:
    """Do what `run` does, wherever the memory suffices."""
    checkpoints = session.checkpoints
    report = ReportOnTheWay(session.recipe.run.dir, session.tracker.message)
    try:
        if not session.progress.iteration:
            if session.recipe.run.preflight:
                checks.quick(Parts.of(session), session.tracker.message)
            session.world.on_main(lambda: record_provenance(session.recipe, session.scorer.sources))
        before = baseline(session)
        checkpoints.beginning = session.world.on_main(
            lambda: identity.begin(session.recipe.run.dir)
        )
        course = open_course(session, before)
        on_the_way(session, course)  # of an attempt that was stopped before it
        while session.progress.iteration < session.recipe.run.iterations:
            iterate(session)
            if on_the_way(session, course):
                save(session)
            if session.world.main:
                report.write_if_due()
        checkpoints.end_saving(session.trainer, session.progress)
        return finish(session, course)
    except Stopped:  # the unfinished iteration has not changed the weights
        session.trainer.optimizer.zero_grad(set_to_none=True)
        checkpoints.end_saving(session.trainer, session.progress)
        session.stop.tell()
        done = session.progress.iteration
        session.tracker.message(
            f"asked to stop: saved after {done} iterations; start again to go on"
        )
        return None
    except Exploded as failure:
        raise UserError(f"{failure} {leave_exploded(session, failure)}") from None
    except (NoScores, Hacked):  # the weights are those of the last finished iteration
        checkpoints.end_saving(session.trainer, session.progress)
        raise


def save(session: Session) -> None:
    """Save a checkpoint where one is due. A save that fails does not end the run."""
    session.ranks.heart.enter("save")
    recipe, progress = session.recipe, session.progress
    problem = session.checkpoints.save_if_due(session.trainer, progress, recipe.run.iterations)
    if problem is not None:
        session.tracker.message(f"training goes on without it: {problem}")


def leave_exploded(session: Session, failure: Exploded) -> str:
    """Set the checkpoint of exploded weights aside and note the explosion.

    returns the sentence that says where the run goes on
    """
    recipe, checkpoints, done = session.recipe, session.checkpoints, session.progress.iteration
    rejected = failure.drawn and checkpoints.reject(done)
    good = checkpoints.newest_before(done + (not failure.drawn))
    session.world.on_main(lambda: explosion.write_note(recipe, done + 1))
    aside = f"Checkpoint step-{done} has these weights and is set aside as step-{done}.exploded. "
    begin = f"the newest good checkpoint, {good}" if good else "the beginning"
    return f"{aside if rejected else ''}Started again with another rate, it goes on from {begin}."


def iterate(session: Session) -> None:
    """One iteration of Algorithm 1."""
    recipe, iteration = session.recipe, session.progress.iteration
    objective, group = recipe.objective, recipe.rollout.samples_per_prompt
    watch = session.ranks.watch(iteration)

    # 1. a batch of prompts
    texts, conditions = session.training.batch(recipe, iteration)
    plan = methods.of(objective.kind).plan(session.training.plan(recipe, iteration), objective)

    # 2. trajectories of the current policy, and their rewards
    rollouts = rollouts_of(session, texts, watch)
    plan, scouted = scouted_plan(session, rollouts, conditions, plan)
    dealing = Dealing(
        conditions=conditions, plan=plan, batch_size=recipe.rollout.at_once, world=session.world
    )
    trajectories, scored = rollouts.draw(dealing)
    check_validity(recipe, scored, iteration, session.scorer.hint)

    # 3. advantages within each prompt's group, or each noise's, summed over rewards
    advantages = advantages_of(session, scored)
    selected = selected_samples(recipe, advantages, scored.valid)

    # 4. optimizer steps on a subset of the timesteps
    experience = Experience(
        plan=plan,
        conditions=conditions,
        trajectories={slot: own for slot, own in trajectories.items() if selected[slot]},
        advantages=advantages,
        selected=selected,
        batch_sizes=dealing.batch_sizes(),
        judge=judge_of(session, texts, conditions),
    )
    del trajectories  # what was not selected goes now
    metrics = update(
        session.trainer,
        objective=objective,
        experience=experience,
        world=session.world,
        poll_before=session.stop.poll_before,
    )
    watch.lap("update")
    session.scorer.release()

    ranks = session.ranks.gather(iteration, watch)
    flat = (advantages.reshape(-1, recipe.advantage_size) == 0).all(1)
    metrics |= {alarms.GROUPS: float(flat.sum()), alarms.EMPTY: float(flat.all())}
    metrics |= dealing.metrics() if methods.traits(recipe).noisy_steps else {}
    metrics |= scouted.metrics(recipe, scored) if scouted is not None else {}
    metrics |= reward_metrics(scored, recipe.weights, group) | watch.metrics() | ranks.metrics()
    session.tracker.log(iteration, metrics, ranks.note())
    session.progress.iteration += 1
    session.progress.seconds += metrics["seconds/total"]
    tell_alarms(session, metrics)


def advantages_of(session: Session, scored: Scored) -> Tensor:
    """Advantages by the rewards, or by a file's preferences.  returns float32 [N]"""
    if session.pairs is not None:
        return session.pairs.advantages(len(scored.valid))
    recipe = session.recipe
    return combined_advantages(
        scored.values,
        valid=scored.valid,
        weights=recipe.weights,
        group_size=recipe.advantage_size,
        objective=recipe.objective,
    )


def selected_samples(recipe: Recipe, advantages: Tensor, valid: Tensor) -> Tensor:
    """The samples that the update trains.

    advantages: float32 [N];  valid: bool [N];  returns bool [N]
    """
    group, keep = recipe.rollout.samples_per_prompt, recipe.objective.best_of_n
    return selection.best_of_n(advantages, valid, group, keep) if keep else valid


def judge_of(
    session: Session, texts: Sequence[str], conditions: Sequence[Condition]
) -> InProcessJudge | None:
    """The rewards with their gradient, where the method's loss has it.

    texts, conditions: of the prompts
    """
    recipe = session.recipe
    if not methods.traits(recipe).differentiates:
        return None
    return InProcessJudge(
        policy=session.policy,
        recipe=recipe,
        texts=texts,
        conditions=conditions,
        sources=session.scorer.sources,
    )


def rollouts_of(session: Session, texts: Sequence[str], watch: Stopwatch) -> Rollouts:
    """What an iteration's samples are drawn and scored with.  texts: of its prompts"""
    return Rollouts(
        recipe=session.recipe,
        trainer=session.trainer,
        scorer=session.scorer,
        texts=texts,
        watch=watch,
        pairs=session.pairs,
        poll_before=session.stop.poll_before,
    )


def scouted_plan(
    session: Session, rollouts: Rollouts, conditions: Sequence[Condition], plan: Plan
) -> tuple[Plan, Scouted | None]:
    """The plan with the noises that scouts choose, where the recipe has scouts."""
    recipe, grid = session.recipe, session.training.scout_grid
    if recipe.rollout.scouts is None or grid is None:
        return plan, None
    of_scouts = candidates(plan, recipe.rollout.scouts, grid, session.training.scout_experts)
    scouted = scout(rollouts, conditions, of_scouts)
    check_validity(recipe, scouted.scored, plan.iteration, session.scorer.hint)
    return replace(plan, candidates=scouted.chosen), scouted


def tell_alarms(session: Session, metrics: dict[str, float]) -> None:
    """Tell what a finished iteration learned nothing from, and a policy that is lost."""
    recipe, progress, tracker = session.recipe, session.progress, session.tracker
    samples, done = recipe.rollout.samples_per_prompt, progress.iteration
    for why in alarms.notes(metrics, progress.counts, recipe.weights, samples, session.scorer.hint):
        tracker.message(f"iteration {done}: {why}")
    progress.count(alarms.counted(metrics))
    spread = not metrics[alarms.EMPTY]
    before = progress.history[-1:]
    collapsed = progress.note(metrics["reward/sum"], spread)
    bounds = recipe.optimizer.lr, recipe.objective.clip_range
    exploded = alarms.ratio_exploded(metrics, *bounds)
    lost = []
    if collapsed:
        lost.append(f"the reward fell from {before[0]:.3f} to {metrics['reward/sum']:.3f} at once")
    if exploded:
        progress.suspect = True
        lost.append(exploded)
    if lost:
        problem = session.checkpoints.finish()
        if problem is not None:
            tracker.message(f"training goes on without it: {problem}")
        good = session.checkpoints.newest_before(done - collapsed)
        progress.last_good = progress.last_good or good
        kept = f"checkpoint {progress.last_good} is of before and is kept"
        if progress.last_good is None:
            kept = "no checkpoint is of before"
        tracker.message(f"iteration {done}: {'; '.join(lost)}; {kept}")
    session.checkpoints.prune(progress)


def finish(session: Session, course: Course) -> dict[str, object]:
    """Evaluate again, compare, write summary.json and the report."""
    before, after = course.before, course.evaluations.get(session.progress.iteration)
    if after is None:
        session.tracker.message("evaluating the held-out prompts after training")
        after = evaluate_now(session)
    folder, tracker = session.recipe.run.dir, session.tracker
    compared = compare(before, after)
    session.checkpoints.prune(session.progress)
    summary: dict[str, object] = {
        **compared,
        "counts": session.progress.counts | {"steps_skipped": float(session.trainer.skipped)},
        "iterations": session.progress.iteration,
        "wall_seconds": session.progress.seconds,
        "ranks": session.world.size,
    }
    names = [f"step-{one.iteration}" for one in (before, after)]

    def write() -> None:
        """Write the files of the run's end, on the main rank."""
        files = {name: folder / "evaluation" / f"{name}.json" for name in names}
        summary["evaluations"] = {name: sha256(file) for name, file in files.items()}
        text = json.dumps(nan_to_null(summary), indent=1, allow_nan=False)
        replace_text(folder / "summary.json", f"{text}\n")
        for when in ("before", "after"):
            values = {f"heldout_{when}/{part}": mean for part, mean in compared[when].items()}
            tracker.summary(values)
        log_clips(session.recipe, tracker, after)
        write_report(folder)

    session.world.on_main(write)
    return summary
