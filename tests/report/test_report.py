"""The HTML report: its content and omissions. The report neither loads files nor runs scripts."""

import copy
import math
import re
from typing import Any

import numpy as np
import pytest
from html_page import Page

from rlhf_jax import report
from rlhf_jax.report import plots
from rlhf_jax.report import results as results_lib

GOLD_FIELDS = ("gold_win_rate_vs_sft", "heldout_win_rate_vs_sft", "gold", "gold_by_category", "truthful_rate")


def policy(win, gold, reward, kl, skill):
    return {
        "gold_win_rate_vs_sft": win and [win, win - 0.02, win + 0.02],
        "heldout_win_rate_vs_sft": win and [win - 0.013, win - 0.04, win + 0.015],
        "gold": gold,
        "reward": reward,
        "kl": kl,
        "skill_accuracy": skill,
        "pretraining_loss": 2.5 - skill,
        "gold_by_category": {"facts & dates": [gold, gold - 0.03, gold + 0.03], "lists": gold - 0.7},
        "truthful_rate": gold,
        "harm_rate": 1 - gold,
        "length": 17.25,
        "diversity": 0.8,
        "gap_closed": (gold - 0.55) / 0.45,
    }


def full_results():
    return {
        "seconds": 284.2,
        "peak_rss_mb": 2048.0,
        "seed": 3,
        "preset": "cpu",
        "dropped": {"too <long>": 17, "empty answer": 0},
        "reward_model": {
            "accuracy": [0.723, 0.709, 0.737],
            "label_agreement": 0.731,
            "calibration": {
                "bins": [
                    {"gap": 0.2, "predicted": 0.55, "accuracy": 0.56, "count": 900},
                    {"gap": 1.5, "predicted": 0.82, "accuracy": 1.0, "count": 31},
                    {"gap": 4.0, "predicted": 0.98, "accuracy": None, "count": 0},
                ],
                "error": 0.0123,
                "slope": 0.91,
            },
        },
        "policies": {
            "base": policy(0.081, 0.21, -1.4, None, 0.92),
            "ppo_ptx": policy(0.782, 0.75, 2.12, 12.9, 0.914),  # out of order on purpose
            "sft": policy(None, 0.55, 0.0, 0.0, 0.9),
            "sft_mix": policy(0.49, 0.548, 0.02, 1.2, 0.918),
            "ppo": policy(0.802, 0.76, 2.31, 14.2, 0.811),
            "best_of_n": policy(0.71, 0.69, 1.5, 1.835, 0.917),
        },
        "transcripts": [
            {
                "prompt": f"Question {i} <script>alert('http://evil')</script>\nsecond line",
                "category": "facts & dates",
                "answers": {"base": "", "sft": "a\nb", "ppo": "<img src=x>", "ppo_ptx": "half a \ud83d character"},
                "gold": {"base": 0.1, "sft": 0.5, "ppo": None},
            }
            for i in range(14)
        ],
        "best_of_n_curve": [
            {"n": n, "kl": math.log(n) - (n - 1) / n, "gold": 0.5 + 0.05 * math.log(n), "reward": 0.4 * math.log(n)}
            for n in (1, 4, 16)
        ],
        "null_check": [0.501, 0.49, 0.512],
        "best_possible_gold": 1.0,
    }


def human_results():
    """Returns results on human data, which has no gold utility."""
    results = full_results()
    for name in ("null_check", "best_possible_gold"):
        del results[name]
    for fields in results["policies"].values():
        for name in GOLD_FIELDS:
            fields[name] = None
        del fields["harm_rate"], fields["skill_accuracy"], fields["gap_closed"]
    for point in results["best_of_n_curve"]:
        point["gold"] = None
    for transcript in results["transcripts"]:
        del transcript["gold"], transcript["category"]
    return results


def full_metrics(gold=True):
    records = [{"stage": s, "step": i, "loss": 1 / (i + 1)} for s in ("pretrain", "sft", "sft_mix") for i in range(30)]
    records += [{"stage": "reward_model", "step": i, "loss": 0.6, "accuracy": 0.7} for i in range(3)]
    for stage in ("ppo", "ppo_ptx"):
        for i in range(40):
            # KL estimates can be negative, and gold values None or NaN.
            value = None if i % 7 == 0 else float("nan") if i % 11 == 0 else 0.5 + 0.01 * i
            record = {"stage": stage, "step": i, "reward": math.sqrt(i), "kl": i - 0.01, "clip_fraction": 0.1}
            records.append(record | ({"gold": value} if gold else {}))
    return records


@pytest.fixture(scope="module")
def full_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    settings = {"seed": 3, "ppo": {"kl_coef": 0.02, "note": "<b>"}}
    report.write_report(path, full_results(), full_metrics(), title="A title & more", settings=settings)
    return path.read_text(encoding="utf-8")


def test_the_page_contains_policies_and_numbers(full_text):
    page = Page(full_text)
    for name in results_lib.POLICIES.values():
        assert name in page.text
    headline = (
        "PPO-ptx beats SFT on 78.2 % of held-out prompts (95 % interval 76.2–80.2), counting a tie as half a win."
    )
    assert headline in page.text
    assert "PPO-ptx to that of SFT with probability 76.9 % (95 % interval 74.2–79.7); the noise" in page.text
    assert "78.2 76.2–80.2 76.9 74.2–79.7 0.750 44.4 2.12 12.90 91.4 1.586 75.0 25.0" in page.text
    assert "preset cpu · seed 3 · duration 4:44 · peak memory 2.0 GiB" in page.text
    assert "the win rate of SFT against itself is 50.1 % (49.0–51.2)." in page.text
    assert "kl_coef" in page.text and "too <long> 17" in page.text and "empty answer 0" not in page.text
    assert "Reward and KL" in page.headings and "Learning curves: Reinforcement learning" in page.headings


def test_the_page_loads_no_files_and_runs_no_scripts(full_text):
    page = Page(full_text)
    assert not {"script", "link", "iframe", "img", "object", "embed", "base"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("href", "src", "xlink:href"):
            assert value is not None and value.startswith("#")
        assert "http" not in (value or "") and "//" not in (value or "")
    style = "".join(re.findall(r"<style.*?</style>", full_text, flags=re.DOTALL))
    assert "@import" not in style and "url(" not in style
    assert len(full_text) < 2_000_000


def test_ids_are_unique_and_references_resolve(full_text):
    attributes = Page(full_text).attributes
    ids = [value for name, value in attributes if name == "id"]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r"(?:href=\"#|url\(#)([^\")]+)", full_text))
    assert used and used <= set(ids)


def test_colours_are_css_variables(full_text):
    body = full_text[full_text.index("<body>") :]
    svgs = re.findall(r"<svg.*?</svg>", body, flags=re.DOTALL)
    assert len(svgs) > 15
    assert not re.search(r"(fill|stroke): #[0-9a-f]{6}", body)
    assert "var(--ppo_ptx)" in body and "prefers-color-scheme: dark" in full_text


def test_transcripts_are_escaped_and_keep_line_breaks(full_text):
    assert "<script>" not in full_text and "&lt;script&gt;" in full_text
    assert "<img src=x>" not in full_text and "a\nb" in full_text
    page = Page(full_text)
    assert "12 held-out prompts; results.json contains 2 more" in page.text
    assert "Question 11" in page.text and "Question 12" not in page.text
    assert "(empty answer)" in page.text and "0.10" in page.text


def test_gains_are_shown_in_reward_model_score_and_in_gold_utility():
    gains = {"reward_gained": [1.25, 1.2, 1.3], "gold_gained": [-0.125, -0.15, -0.1], "gamed": True}
    page = Page(report.render(full_results() | {"goodhart": {"ppo": gains}}, [], title="t"))
    assert "Over-optimisation" in page.headings
    assert "PPO: gain in RM score over SFT-mix" in page.text and "1.250 (1.200–1.300)" in page.text
    assert "−0.125 (−0.150 to −0.100), while the RM score rose" in page.text
    svg = plots.by_policy({"policies": {"ppo": {"x": [0.5, 0.4, None]}}}, "x", xlabel="x")
    assert svg is not None and "0.500 (from 0.400)" in svg


@pytest.mark.parametrize(
    ("low", "high", "line", "edge"),
    [(0.4, 0.6, [0.4, 0.6], None), (0.4, None, [0.4, 0.5], 1), (None, 0.6, [0.5, 0.6], 0)],
)
def test_an_open_interval_is_an_arrow_to_the_edge(low, high, line, edge):
    from matplotlib.figure import Figure

    ax = Figure().subplots()
    plots.point(ax, results_lib.Interval(0.5, low, high), 2.0, "ppo")
    assert np.asarray(ax.lines[0].get_xdata()).tolist() == line
    arrows: list[Any] = [text for text in ax.texts if hasattr(text, "arrow_patch")]
    assert [(each.xy, each.xyann) for each in arrows] == ([] if edge is None else [((edge, 2.0), (0.5, 2.0))])


def test_alarms_are_listed_and_escaped(full_text):
    assert "Alarms" not in Page(full_text).headings
    alarm = {"stage": "ppo_ptx", "step": 12, "name": "negative_kl", "message": "the KL is <b>below</b> 0."}
    text = report.render(full_results() | {"alarms": [alarm]}, [], title="t")
    page = Page(text)
    assert "Alarms" in page.headings and "PPO-ptx, step 12: the KL is <b>below</b> 0." in page.text
    assert "<b>below" not in text
    assert "Alarms" not in Page(report.render(full_results() | {"alarms": []}, [], title="t")).headings


def test_without_gold_utility_its_plots_and_columns_are_omitted(tmp_path):
    path = tmp_path / "report.html"
    report.write_report(path, human_results(), full_metrics(gold=False), title="Human data")
    page = Page(path.read_text(encoding="utf-8"))
    assert "PPO-ptx changes the mean reward-model score from 0.00 (SFT) to 2.12 at a KL of 12.9 nats" in page.text
    for word in ("Gold", "gold", "Truthful", "Harm", "Skill", "labelers", "best possible"):
        assert word not in page.text.replace("two labelers agree", "")
    assert "Preference" not in page.headings and "Truthfulness and harm" not in page.headings
    assert {"Reward model", "Reward and KL", "Alignment tax", "Transcripts"} <= set(page.headings)
    assert "Settings" not in page.headings


def test_results_without_numbers_are_rendered_as_a_page():
    assert Page(report.render({}, [], title="Empty")).headings == []
    nulls = {"policies": {"sft": None, "ppo": {"reward": None}}, "reward_model": None, "transcripts": None}
    nulls |= {"dropped": {}, "best_of_n_curve": None, "seconds": None}
    page = Page(report.render(nulls, [{"stage": "ppo", "step": 1, "reward": None}], title="Nulls"))
    assert page.headings == ["Dropped and truncated records"]


def test_unknown_policies_stages_and_fields_are_shown():
    results = {"policies": {"sft": {"reward": 0.0}, "dpo_$x$": {"reward": 1.0, "gold": float("nan"), "surprise": 0.25}}}
    text = report.render(results, [{"stage": "rehearsal", "step": 1, "loss": 0.5}], title="DPO")
    page = Page(text)
    assert "dpo $x$" in page.text and "nan" in page.text and "surprise" in page.text and "0.250" in page.text
    assert "Learning curves: rehearsal" in page.headings


def test_rendering_is_deterministic(full_text):
    settings = {"seed": 3, "ppo": {"kl_coef": 0.02, "note": "<b>"}}
    again = report.render(full_results(), full_metrics(), title="A title & more", settings=settings)
    assert again.encode("utf-8", errors="xmlcharrefreplace").decode() == full_text


def test_the_headline_depends_on_the_interval():
    results = {"policies": {"sft": {}, "ppo": {"gold_win_rate_vs_sft": [0.51, 0.48, 0.54]}}}
    assert results_lib.headline(results).startswith("PPO does not differ significantly from SFT: it wins on 51.0 %")
    results["policies"]["ppo"]["gold_win_rate_vs_sft"] = [0.4, 0.38, 0.42]
    assert results_lib.headline(results).startswith("PPO loses to SFT: it wins on 40.0 %")
    results["policies"]["ppo_ptx"] = {"gold_win_rate_vs_sft": 0.6}
    beats = "PPO-ptx beats SFT on 60.0 % of held-out prompts, counting a tie as half a win."
    assert results_lib.headline(results) == beats
    results["policies"]["ppo_ptx"]["gold_strict_wins_vs_sft"] = 0.53
    assert results_lib.headline(results) == f"{beats} 53.0 % are strict wins."


def test_the_ptx_coefficient_is_shown_in_both_normalisations():
    (sentence,) = results_lib.summary({"ptx_coef": {"per_token": 27.8, "per_sequence": 5.56}})
    assert "27.800 if this loss and the PPO loss are means over tokens" in sentence
    assert "equivalent coefficient for sums over a sequence is 5.560." in sentence
    assert results_lib.summary({"ptx_coef": {"per_token": 27.8, "per_sequence": None}}) == []


def test_number_formatting():
    assert results_lib.format_number(-0.0004, digits=2) == "0.00"
    assert results_lib.format_number(-1.25, digits=1) == "−1.2"
    assert results_lib.format_number(0.78249, percent=True) == "78.2"
    assert results_lib.format_parts([-1.0, -2.0, 0.5]) == ("−1.0", "−2.0 to 0.5")
    assert results_lib.format_parts(None) == ("–", "")
    assert results_lib.format_parts([3.0, 2.1, None]) == results_lib.format_parts([3.0, 2.1, math.inf])
    assert results_lib.format_parts([3.0, 2.1, None]) == ("3.0", "from 2.1")
    assert results_lib.format_parts([3.0, -math.inf, 4.0]) == ("3.0", "up to 4.0")
    assert results_lib.format_parts([3.0, -math.inf, math.inf]) == ("3.0", "")
    assert results_lib.finite([3.0, 2.1, math.inf]) == (3.0, 2.1, None)
    assert results_lib.interval([1.0, None, 2.0]) == (1.0, None, 2.0)
    assert results_lib.interval("0.5") is None and results_lib.interval(True) is None
    assert results_lib.interval(np.float32(0.5)) == (0.5, None, None)
    assert [results_lib.seconds_text(s) for s in (9.44, 59.99, 3723)] == ["9.4 s", "1:00", "1:02:03"]


def test_the_calibration_plot_shows_intervals():
    def plot(**ends):
        bins = [{"gap": 1.0, "accuracy": 0.5, "count": 3, **ends}]
        return plots.calibration({"reward_model": {"calibration": {"bins": bins}}})

    assert plot() == plot(lo=None, hi=None) and len({plot(), plot(lo=0.3, hi=0.7), plot(lo=0.4, hi=0.7)}) == 3


def test_rendering_does_not_modify_its_arguments():
    results, metrics = full_results(), full_metrics()[-3:]
    before = copy.deepcopy((results, metrics[-1]))
    report.render(results, metrics, title="x")
    assert (results, metrics[-1]) == before


def test_running_mean_keeps_a_steep_start():
    y = np.array([8.0, 4.0, 2.0, 1.0, 3.0])
    np.testing.assert_allclose(
        plots.running_mean(y, width=2), [8, 14 / 3, 18 / 5, (4 + 2 + 1 + 3) / 4, (2 + 1 + 3) / 3]
    )
    np.testing.assert_allclose(plots.running_mean(y, width=0), y)


def test_downsample_averages_neighbours():
    np.testing.assert_allclose(plots.downsample(np.arange(6.0), most=3), [0.5, 2.5, 4.5])
    np.testing.assert_allclose(plots.downsample(np.arange(3.0), most=3), [0, 1, 2])


def test_line_fit_needs_three_points_and_variation():
    x = np.arange(9.0)
    assert plots.line_fit(x, 2 * x + 1) == pytest.approx(1.0)
    assert plots.line_fit(x, np.ones(9)) is None and plots.line_fit(x[:2], x[:2]) is None
