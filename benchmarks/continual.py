"""Do the strategies help on a real model? `python -m benchmarks.continual --stage 1 --json OUT`.

Every strategy runs with its untouched job defaults and is compared, test row by test row, with plain training
at the best of three learning rates, which development rows choose. A finished run is stored and not repeated.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.arms import Arm, parse_arms, registered_arms
from benchmarks.clbench import Row, TaskRows, read_task, shorten
from benchmarks.continual_runs import Run, Setup, result_of
from benchmarks.report import target, write_report
from benchmarks.stats import paired_bootstrap
from clcore.engine.errors import ConfigError, DataError
from clcore.engine.tasks import derive_seed
from clcore.evaluation import matrix_scalars
from service.settings import Settings
from service.specs import LoraSpec, TrainingSpec

REPOSITORY = Path(__file__).parents[1]
RESULTS = REPOSITORY / "benchmarks" / "results" / "continual"
MODEL = "smollm2-135m"
TUNED_RATES = (3e-4, 1e-3, 3e-3)


@dataclasses.dataclass(frozen=True)
class Stage:
    """A sequence of tasks and how long each is trained."""

    tasks: tuple[str, ...]
    steps: int
    test_rows: int
    dev_rows: int
    max_prompt_tokens: int


STAGES = {1: Stage(tasks=("dbpedia", "yelp"), steps=30, test_rows=100, dev_rows=50, max_prompt_tokens=96)}


def load_model(folder: Path, lora: LoraSpec, seed: int) -> tuple[nn.Module, Any]:
    """Load the base model in float32 with a fresh adapter from the seed, as the service's worker does."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    torch.manual_seed(derive_seed(seed, "adapter"))
    config = LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=sorted(lora.target_modules) if lora.target_modules else None,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(base, config), tokenizer


def read_rows(stage: Stage, folder: Path, tokenizer: Any, seed: int, batch_size: int) -> list[TaskRows]:
    """Draw the stage's rows and shorten their prompts. Raises DataError for missing or too few rows."""
    tasks = []
    for name in stage.tasks:
        task = read_task(
            folder,
            name,
            num_train=stage.steps * batch_size,
            num_dev=stage.dev_rows,
            num_test=stage.test_rows,
            seed=seed,
        )

        def short(rows: Sequence[Row]) -> list[Row]:
            return [shorten(row, tokenizer, stage.max_prompt_tokens) for row in rows]

        tasks.append(TaskRows(name, short(task.train), short(task.dev), short(task.test)))
    return tasks


def run_all(setup: Setup, arms: Sequence[Arm], folder: Path) -> tuple[list[dict[str, Any]], list[Any]]:
    """Run, or read back, everything; return the report's rows and targets."""
    default = setup.training.learning_rate
    base = result_of(Run("base", None, default), setup, folder)
    tuning = [Run(f"none-{rate:g}", Arm("none"), rate, has_dev_scores=True) for rate in TUNED_RATES]
    tuned = [(run, result_of(run, setup, folder)) for run in tuning]
    best_run, best = max(tuned, key=lambda item: _mean(item[1]["dev"]))  # the lower rate of equals
    if default in TUNED_RATES:  # then plain training at the default rate is one of the tuning runs
        arms = [arm for arm in arms if arm != Arm("none")]
    multitask = Run("multitask", Arm("none"), default, is_multitask=True)
    runs = [multitask, *(Run(arm.label, arm, default) for arm in arms)]
    results = [*tuned, *((run, result_of(run, setup, folder)) for run in runs)]
    rows = [summary(base, base, base)]
    rows += [
        {**summary(result, base, best), "learning_rate": run.learning_rate, "is_tuned_none": run is best_run}
        for run, result in results
    ]
    targets = [
        target(
            f"{row['run']}: upper end of the 95 % interval of average accuracy minus that of tuned none",
            row["difference_high"],
            ">= 0",
            row["difference_high"] >= 0,
        )
        for row in rows
        if row["run"] in {arm.label for arm in arms}
    ]
    return rows, targets


def summary(
    result: Mapping[str, Any], base: Mapping[str, Any], tuned_none: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the scalars of a result and its difference to tuned none."""
    matrix, final = result["matrix"], result["answers"][-1]
    scalars = matrix_scalars(matrix, base["matrix"][0]) if len(matrix) == len(final) else {}
    difference = paired_bootstrap(final, tuned_none["answers"][-1])
    return {
        "run": result["run"],
        "matrix": matrix,
        "average_accuracy": _mean(matrix[-1]),
        **{key: scalars.get(key) for key in ("learning_accuracy", "forgetting", "bwt", "fwt")},
        "dev_accuracy": _mean(result["dev"]) if "dev" in result else None,
        "difference": difference.mean,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "loses": difference.high < 0,
        "wins": difference.low > 0,
        "seconds": result["seconds"],
        "settings_hash": result["settings_hash"],
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Write the rows as Markdown."""
    heads = "| run | average | learning | forgetting | BWT | minus tuned none, 95 % interval | |"
    lines = [heads, "|---" * 7 + "|"]
    for row in rows:
        keys = ("average_accuracy", "learning_accuracy", "forgetting", "bwt")
        cells = ["" if row[key] is None else f"{row[key]:.3f}" for key in keys]
        verdict = "loses" if row["loses"] else "wins" if row["wins"] else ""
        if row.get("is_tuned_none"):
            interval, verdict = "", "tuned none"
        else:
            low, high = row["difference_low"], row["difference_high"]
            interval = f"{row['difference']:+.3f} [{low:+.3f}, {high:+.3f}]"
        if row["run"] == "base":
            interval, verdict = "", "untrained"
        lines.append(f"| {row['run']} | {' | '.join(cells)} | {interval} | {verdict} |")
    return "\n".join(lines)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def main() -> None:
    """Run a stage, write the report and a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stage", type=int, required=True, help="1: dbpedia, then yelp")
    parser.add_argument("--json", type=Path, required=True, help="where the report goes")
    parser.add_argument("--strategies", help="name[:key=value...], with commas between; default: all")
    parser.add_argument("--model", type=Path, default=Settings().models_dir / MODEL)
    parser.add_argument("--data", type=Path, default=REPOSITORY.parent / "shared" / "data" / "clbench")
    parser.add_argument("--results", type=Path, help="folder of finished runs; default: results/continual")
    parser.add_argument("--steps", type=int, help="per task, for a trial")
    parser.add_argument("--test-rows", type=int, help="per task, for a trial")
    parser.add_argument("--threads", type=int, help="of torch; default: all cores")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if options.stage not in STAGES:
        parser.error(f"there is no stage {options.stage}; stages: {', '.join(map(str, STAGES))}")
    if not (options.model / "config.json").is_file():
        parser.error(f"no model in {options.model}; fetch it with: clpeft model prepare {MODEL}")
    if options.threads:
        torch.set_num_threads(options.threads)
    changes = {"steps": options.steps, "test_rows": options.test_rows}
    given = {key: value for key, value in changes.items() if value is not None}
    stage = dataclasses.replace(STAGES[options.stage], **given)
    lora, training = LoraSpec(), TrainingSpec()
    try:
        arms = parse_arms(options.strategies) if options.strategies else registered_arms(with_variants=False)
        tokenizer = AutoTokenizer.from_pretrained(options.model)
        tasks = read_rows(stage, options.data, tokenizer, training.seed, training.batch_size)
    except (ConfigError, DataError) as error:
        parser.error(str(error))
    setup = Setup(
        stage=options.stage,
        tasks=tasks,
        steps=stage.steps,
        max_prompt_tokens=stage.max_prompt_tokens,
        model_name=options.model.name,
        load=lambda: load_model(options.model, lora, training.seed),
        lora=lora,
        training=training,
    )
    with tempfile.TemporaryDirectory() as nowhere:  # a trial leaves nothing among the results
        folder = options.results or (Path(nowhere) if given else RESULTS)
        rows, targets = run_all(setup, arms, folder)
    write_report(options.json, f"continual-stage{options.stage}", rows, targets)
    sys.stdout.write(table(rows) + "\n")


if __name__ == "__main__":
    main()
