"""make results: renders the README's tables from the measured files, so that no figure in it is typed by hand.

    python benchmarks/render.py [README] [RESULTS]

A table NAME replaces what stands between ``<!-- results:NAME -->`` and ``<!-- /results:NAME -->``. Of several files
that measured the same thing on the same machine, the newest counts.
"""

import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from fastres.config import as_flag, as_json, read_json
from fastres.errors import UserError
from fastres.profile import ProfileConfig
from fastres.report.study import as_markdown, one_of_each_model, read_results, scale_line, table

Content = dict[str, Any]


def main(arguments: list[str]) -> int:
    """Returns 0, or 2 with one line where a file is missing or damaged, or the README has no place for a table."""
    readme = Path(arguments[0] if arguments else "README.md")
    results = Path(arguments[1] if len(arguments) > 1 else "benchmarks/results")
    try:
        text = readme.read_text(encoding="utf-8")
        if not re.search(r"<!-- results:\w+ -->", text):
            raise UserError(f"{readme} has no <!-- results:NAME --> to fill")
        contents = [{**read_json(path), "folder": path.parent} for path in sorted(results.rglob("*.json"))]
        readme.write_text(render(text, contents), encoding="utf-8")
    except (OSError, UserError) as error:
        print(f"render: error: {error}", file=sys.stderr)
        return 2
    return 0


def render(text: str, contents: Iterable[Content]) -> str:
    """``text`` with its tables filled from ``contents``. Raises KeyError for a table that is not in ``TABLES``."""
    contents = list(contents)

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        return f"<!-- results:{name} -->\n{TABLES[name](contents)}\n<!-- /results:{name} -->"

    return re.sub(r"<!-- results:(?P<name>\w+) -->.*?<!-- /results:(?P=name) -->", fill, text, flags=re.DOTALL)


def profile_tables(contents: list[Content]) -> str:
    """A table for each model, batch size and device that was profiled."""
    newest = {}
    for profile in sorted((content for content in contents if "limit_epoch_seconds" in content), key=_date):
        newest[profile["device"], profile["model"], profile["batch_size"]] = profile
    return "\n\n".join(profile_table(newest[key]) for key in sorted(newest))


def profile_table(profile: Content) -> str:
    rows = [
        [
            row["name"],
            f"{row['epoch_seconds']['median']:,.2f}",
            f"{row['epoch_seconds']['p20']:,.2f} to {row['epoch_seconds']['p80']:,.2f}",
            f"{row['images_per_second']:,.0f}",
            f"{row['times_eager']:.2f}",
            f"{100 * row['data_wait_fraction']:.1f} %",
            f"{row['peak_memory_mb']:,.0f}",
            f"{100 * row['limit_share']:.0f} %",
        ]
        for row in profile["variants"]
    ]
    head = ["", "s/epoch", "p20 to p80", "images/s", "x eager", "data wait", "peak MiB", "of the limit"]
    defaults = as_json(ProfileConfig()) | {"model": None}  # which is always shown
    settings = {name: value for name, value in profile["config"].items() if name not in ("output_dir", "trace")}
    flags = [as_flag(name, value) for name, value in settings.items() if value != defaults[name]]
    caption = (
        f"`python -m fastres.profile {' '.join(flags)}`: {profile['images_per_epoch']:,} {profile['dataset']} images "
        f"an epoch, batch {profile['batch_size']}, {profile['augmentation']}; {profile['device']}; {profile['rounds']} "
        f"rounds of {profile['steps_per_round']} of {profile['steps_per_epoch']} steps; torch "
        f"{profile['versions']['torch']}, commit {_short(profile['commit'])}, {profile['date']}. Limit "
        f"{profile['limit_epoch_seconds']:,.2f} s."
    )
    return f"{caption}\n\n{table(head, rows)}"


def training_table(contents: list[Content]) -> str:
    """Whole runs, each with its command; best is best on the test set unless the summary says otherwise."""
    rows = []
    runs = [content for content in contents if "summary" in content]
    for run in sorted(runs, key=lambda run: run["command"].split("python", 1)[1]):
        summary = run["summary"]
        rows.append(
            [
                f"`{run['command']}`",
                run["data"],
                f"{summary['best_accuracy']:.2f} / {summary['last_accuracy']:.2f} %",
                f"{summary['epoch_seconds']:,.1f}",
                f"{summary['images_per_second']:,.0f}",
                f"{100 * summary['data_wait_fraction']:.1f} %",
                f"{summary['device']}, {_provenance({**summary, 'date': run['date'][:10]})}",
            ]
        )
    head = ["command", "data", "best / last test accuracy", "s/epoch", "images/s", "data wait", "measured"]
    return table(head, rows)


def loader_table(contents: list[Content]) -> str:
    """Images a second of both loaders, for each kind of image and device."""
    rows = []
    for (machine, _, _), (extra, note) in _newest(contents, "loader").items():
        rates = extra["images_per_second"]
        rows.append(
            [
                f"{machine if extra['device'] == 'cpu' else note['gpu']}",
                extra["images"],
                *(f"{rates[name]['p50']:,.0f}" for name in ("eager", "dali")),
                f"{extra['times_as_long']['eager']['p50']:.1f}",
                _provenance(note),
            ]
        )
    return table(["device", "images", "eager, images/s", "DALI, images/s", "x eager", "measured"], rows)


def step_table(contents: list[Content]) -> str:
    """A training step of each model, fastres' defaults against the studies' loop."""
    rows = [
        [
            note["gpu"] or machine,
            f"`{extra['model']}`",
            str(extra["batch_size"]),
            *(f"{1000 * extra['seconds'][name]['p50']:,.1f}" for name in ("eager", "fastres")),
            f"{extra['times_as_long']['eager']['p50']:.2f}",
            _provenance(note),
        ]
        for (machine, _, _), (extra, note) in _newest(contents, "step").items()
    ]
    return table(["device", "model", "batch", "eager, ms", "fastres, ms", "x eager", "measured"], rows)


def operator_table(contents: list[Content]) -> str:
    """The fused operator against its rivals: the median over shapes of how many times as long each takes."""
    groups: dict[tuple[str, str, str], list[tuple[Content, Content]]] = {}
    for (machine, _, name), (extra, note) in _newest(contents, None).items():
        if match := re.search(r"test_batch_norm_relu\[(?:.*-)?(\S+x\S+)-([a-z+]+)-(plain|residual)\]", name):
            groups.setdefault((note["gpu"] or machine, match[2], match[3]), []).append((extra, note))
    rows = [
        [
            *key,
            *(
                f"{statistics.median(extra['times_as_long'][rival]['p50'] for extra, _ in measured):.2f}"
                for rival in ("eager", "compile", "copy")
            ),
            _provenance(measured[0][1]),
        ]
        for key, measured in sorted(groups.items())
    ]
    return table(["device", "direction", "", "eager", "compile", "copy", "measured"], rows)


def study_table(contents: list[Content]) -> str:
    """The runs of all studies beside the published figures, and what an epoch costs against eager PyTorch."""
    rows, captions = [], []
    for study in sorted((content for content in contents if "study" in content), key=lambda study: study["study"]):
        results = read_results(study["folder"], study)
        compared = one_of_each_model(results)  # the one that eager PyTorch trained, too
        for result in results:
            published = result.published.get("best_accuracy")
            rows.append(
                [
                    f"`{study['study']}`: {as_markdown(result.label)}",
                    f"{published:.2f}" if published else "",
                    *(result.estimate(metric).text() for metric in ("best_accuracy", "last_accuracy")),
                    result.estimate("epoch_seconds").text(1),
                    f"{result.times_eager:.1f}" if result.eager and result in compared else "",
                ]
            )
        summary = results[0].summaries[0]
        captions.append(
            f"`{study['study']}`: {as_markdown(scale_line(study))}; {summary['train_images']:,} training images; seeds "
            f"{', '.join(str(run['seed']) for run in results[0].summaries)}; {summary['device']}; "
            f"{_provenance({**summary, 'date': study['date'][:10]})}."
        )
    head = ["run", "published best, %", "best, %", "last, %", "s/epoch", "x eager"]
    return "\n\n".join([table(head, rows), "\n".join(f"* {caption}" for caption in captions)])


TABLES: dict[str, Callable[[list[Content]], str]] = {
    "profile": profile_tables,
    "training": training_table,
    "loaders": loader_table,
    "steps": step_table,
    "operator": operator_table,
    "studies": study_table,
}


def _newest(contents: list[Content], what: str | None) -> dict[tuple[str, str | None, str], tuple[Content, Content]]:
    """The benchmarks of that kind: (processor, GPU, name) to what was measured and where; the newest of each."""
    found = {}
    for content in sorted((content for content in contents if "benchmarks" in content), key=_date):
        where = content["machine_info"]["fastres"] | {"date": content["datetime"][:10]}
        for benchmark in content["benchmarks"]:
            if benchmark["extra_info"].get("what") == what:
                found[where["cpu"], where["gpu"], benchmark["name"]] = benchmark["extra_info"], where
    return found


def _date(content: Content) -> str:
    return content.get("date") or content["datetime"]


def _provenance(where: Content) -> str:
    return f"{where['date']}, torch {where['versions']['torch']}, {_short(where['commit'])}"


def _short(commit: str | None) -> str:
    if commit is None:
        return "unknown"
    return commit[:7] + ("-dirty" if commit.endswith("-dirty") else "")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
