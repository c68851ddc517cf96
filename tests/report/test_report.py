"""The HTML report: its content and omissions. The report neither loads files nor runs scripts."""

import copy
import math
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
import real_run
from html_page import Page

from rlhf_jax import report
from rlhf_jax.report import console, plots
from rlhf_jax.report import page as page_lib
from rlhf_jax.report import results as results_lib


def full_results():
    """Returns real results, with texts that must be escaped and more transcripts than the page shows."""
    results = real_run.results()
    texts = {"base": "", "sft": "a\nb", "ppo": "<img src=x>", "ppo_ptx": "half a \ud83d character"}
    prompt = "Question {} <script>alert('http://evil')</script>\nsecond line"
    (each, *_) = results["transcripts"]
    results["transcripts"] = [each | {"prompt": prompt.format(i), "answers": texts} for i in range(14)]
    return results | {"dropped": {"too <long>": 17, "empty answer": 0}}


def full_metrics():
    """Returns real metrics, of which some values of the gold utility were not finite."""
    return [
        record | ({"gold": None} if "gold" in record and record["step"] % 3 == 2 else {})
        for record in real_run.metrics()
    ]


def human_metrics():
    return [{name: x for name, x in record.items() if name != "gold"} for record in real_run.metrics()]


@pytest.fixture(scope="module")
def full_text(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    settings = {"seed": 3, "ppo": {"kl_coef": 0.02, "note": "<b>"}}
    report.write_report(path, full_results(), full_metrics(), title="A title & more", settings=settings)
    return path.read_text(encoding="utf-8")


def test_large_numbers_have_separators_and_names_that_users_chose_are_kept():
    assert console.metrics_text({"tokens_per_second": 18794.6, "learning_rate": 2e-5}) == (
        "tokens per second 18,795 · learning rate 2e-05"
    )
    assert results_lib.label("sample sft_bf") == "sample sft_bf" and results_lib.label("sft_more") == "sft more"


def test_the_page_contains_policies_and_numbers(full_text):
    page = Page(full_text)
    results = full_results()
    for name in results["policies"]:
        assert results_lib.label(name) in page.text
    policy, percent = results["policies"]["ppo_ptx"], partial(real_run.text, percent=True)
    mean, bounds = percent(policy["gold_win_rate_vs_sft"]).split()
    assert f"{mean} % of held-out prompts (95 % interval {bounds}), counting a tie as half a win." in page.text
    mean, bounds = percent(policy["heldout_win_rate_vs_sft"]).split()
    assert f"PPO-ptx to that of SFT with probability {mean} % (95 % interval {bounds}); the noise" in page.text
    cells = [
        *(percent(policy[f"{by}_win_rate_vs_sft"]) for by in ("gold", "length_controlled", "labeler", "heldout")),
        real_run.text(policy["gold"], digits=3),
        percent(policy["gap_closed"]),
        *(real_run.text(policy[name], digits=2) for name in ("reward", "kl")),
    ]
    assert " ".join(cells) in page.text
    peak = f"peak memory {results['peak_rss_mb'] / 1024:.1f} GiB"
    assert f"preset smoke · seed 0 · duration {results_lib.seconds_text(results['seconds'])} · {peak}" in page.text
    mean, bounds = percent(results["null_check"]).split()
    assert f"the win rate of SFT against itself is {mean} % ({bounds})." in page.text
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
    (transcript, *_) = full_results()["transcripts"]
    assert "(empty answer)" in page.text and f"{transcript['gold']['ppo']:.2f}" in page.text


def test_gains_are_shown_in_reward_model_score_and_in_gold_utility():
    results = full_results()
    gains = results["goodhart"]["ppo"] | {"gold_gained": [-0.125, -0.15, -0.1], "gamed": True}
    results["goodhart"] |= {"ppo": gains}
    page = Page(report.render(results, [], title="t"))
    assert "Over-optimisation" in page.headings
    mean, bounds = real_run.text(gains["reward_gained"], digits=3).split(maxsplit=1)
    assert f"PPO: gain in RM score over SFT-mix {mean} ({bounds})" in page.text
    assert "PPO: gain in gold utility over SFT-mix −0.125 (−0.150 to −0.100), while the RM score rose" in page.text
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
    results = real_run.human_results()
    report.write_report(path, results, human_metrics(), title="Human data")
    page = Page(path.read_text(encoding="utf-8"))
    first, last = (
        real_run.text(results["policies"][name]["reward"], digits=2).split()[0] for name in ("sft", "ppo_ptx")
    )
    kl = real_run.text(results["policies"]["ppo_ptx"]["kl"]).split()[0]
    assert f"PPO-ptx changes the mean reward-model score from {first} (SFT) to {last} at a KL of {kl} nats" in page.text
    # A caption about length bias names the labelers.
    for word in ("Gold", "gold", "Truthful", "Harm", "Skill", "held-out labelers", "best possible", "closes"):
        assert word not in page.text
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


def test_the_gap_that_is_closed_is_stated_in_words(full_text):
    results = full_results()
    shares = {name: results["policies"][name]["gap_closed"] for name in ("ppo", "ppo_ptx", "best_of_n")}
    percents = {name: real_run.text(x, percent=True).split(maxsplit=1) for name, x in shares.items()}
    texts = [
        f"{results_lib.label(name)} {mean} %" + "".join(f" ({each})" for each in bounds)
        for name, (mean, *bounds) in percents.items()
    ]
    assert results_lib.gap_closed(results) == ", ".join(texts)
    start = "Share of the gap between SFT's gold utility and the maximum of 1.000 that a policy closes: "
    assert f"{start}{', '.join(texts)}." in Page(full_text).text
    results["policies"]["ppo"]["gap_closed"] = [0.5, 0.4, 0.6]
    assert results_lib.gap_closed(results).startswith("PPO 50.0 % (40.0–60.0), PPO-ptx ")
    assert results_lib.gap_closed(real_run.human_results()) == ""


def test_the_page_says_which_prompts_are_answered(full_text):
    text = Page(full_text).text
    prompts = full_results()["policies"]["best_of_n"]["prompts"], full_results()["held_out"]["prompts"]
    assert "Best-of-n answers {} of {} prompts. Its win rates compare it with the answers".format(*prompts) in text
    assert "means over rollouts, which answer training prompts; best-of-n answers held-out prompts." in text


def test_counts_are_printed_as_integers(full_text):
    page = Page(full_text)
    assert "4.000" not in page.text and "32.000" not in page.text
    results = full_results()
    keys = [column.key for column in results_lib.other_columns(results)]
    assert {"n", "prompts", "skills.sum"} <= set(keys)
    table = page_lib.table(results, results_lib.other_columns(results))
    cells = dict(zip(keys, table["rows"][-1]["cells"]))
    assert (cells["n"], cells["prompts"]) == (("4", ""), ("32", ""))
    assert dict(page_lib.reward_model_rows(results))["Held out pairs"] == str(results["reward_model"]["held_out_pairs"])
    assert "skill: sum" in page.text


def test_incidents_are_listed_and_escaped():
    incidents = [{"stage": "data", "text": "all 40 comparisons have the same <prompt>"}]
    page = Page(report.render(full_results() | {"incidents": incidents}, [], title="t"))
    assert "Incidents" in page.headings and "data: all 40 comparisons have the same <prompt>" in page.text
    assert "Incidents" not in Page(report.render(full_results(), [], title="t")).headings


def test_what_only_some_runs_have_is_shown():
    other = {"accuracy": [0.612, 0.5, 0.7]}
    more = {"published": "ziegler", "heldout_reward_model": other, "implicit_accuracy": [0.687, 0.65, 0.72]}
    page = Page(report.render(full_results() | more, [], title="t"))
    assert "preset smoke · published ziegler · seed 0" in page.text
    assert "Held-out reward model's accuracy 61.2 % (50.0–70.0)" in page.text
    assert "The implicit reward agrees with 68.7 % of held-out comparisons (95 % interval 65.0–72.0)." in page.text


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
