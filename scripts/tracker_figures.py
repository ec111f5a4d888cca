"""How well a tracker does on a video of drawn people, whose identities and joints are known: the figures of `scripts/bench_tracker.py`.

A person and a track match in a frame if the mean distance of the visible keypoints is at most a quarter of the person's size (the square root of the box's
area). IDF1 and identity switches are those of Ristani et al. 2016 and of CLEAR MOT (Bernardin and Stiefelhagen 2008).
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.optimize import linear_sum_assignment

NEAR = 0.25


@dataclass(frozen=True, kw_only=True)
class Frame:
    """What was found, or what is there: ids, (N, K, 2) keypoints, for the truth (N, K) whether they are visible and the persons' sizes."""

    ids: list[int]
    keypoints: np.ndarray
    visible: np.ndarray | None = None
    sizes: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The figures of one tracker.

    Attributes:
        idf1: share of the persons' frames that one track has, for the best pairs of persons and tracks.
        switches: how often a person's track becomes another.
        recall: share of the persons' frames that any track has.
        false: tracks where nobody is, a frame.
        error_px: mean distance of visible keypoints from where they are.
        jitter_px: mean length of the second difference of that error: what a picture trembles.
        lag: frames that the keypoints are behind, by their error along the way they move.
    """

    idf1: float
    switches: int
    recall: float
    false: float
    error_px: float
    jitter_px: float
    lag: float


def read_truth(path: Path) -> list[Frame]:
    content = json.loads(path.read_text())
    of_image: dict[int, list[dict]] = {image["id"]: [] for image in content["images"]}
    for one in content["annotations"]:
        of_image[one["image_id"]].append(one)
    frames = []
    for image in content["images"]:
        rows = of_image[image["id"]]
        points = np.array([row["keypoints"] for row in rows], dtype=float).reshape(len(rows), -1, 3)
        sizes = np.array([np.sqrt(row["bbox"][2] * row["bbox"][3]) for row in rows])
        frames.append(Frame(ids=[row["track_id"] for row in rows], keypoints=points[..., :2], visible=points[..., 2] == 2, sizes=sizes))
    return frames


def figures(truth: list[Frame], found: list[Frame]) -> Figures:
    pairs: dict[tuple[int, int], int] = {}
    last: dict[int, int] = {}
    matches: list[dict[int, int]] = []  # per frame: row of the truth -> row of what was found
    switches = persons = tracked = false = total = 0
    for there, here in zip(truth, found, strict=True):
        distances = near(there, here)
        for i, j in zip(*np.nonzero(distances <= NEAR), strict=True):
            pairs[there.ids[i], here.ids[j]] = pairs.get((there.ids[i], here.ids[j]), 0) + 1
        match = matched(there, here, distances, last)
        for i, j in match.items():
            person, track = there.ids[i], here.ids[j]
            switches += last.get(person, track) != track
            last[person] = track
        matches.append(match)
        persons += len(there.ids)
        total += len(here.ids)
        tracked += len(match)
        false += len(here.ids) - len(match)
    error, jitter, lag = of_keypoints(truth, found, matches)
    return Figures(
        idf1=2 * best_pairs(pairs) / (persons + total), switches=switches, recall=tracked / persons, false=false / len(truth),
        error_px=error, jitter_px=jitter, lag=lag,
    )  # fmt: skip


def near(there: Frame, here: Frame) -> np.ndarray:
    """(T, F) mean distances of visible keypoints in persons' sizes; who has none is near nobody."""
    result = np.full((len(there.ids), len(here.ids)), np.inf)
    assert there.visible is not None
    assert there.sizes is not None
    for i, (points, seen, size) in enumerate(zip(there.keypoints, there.visible, there.sizes, strict=True)):
        if seen.any() and len(here.ids):
            result[i] = np.linalg.norm(here.keypoints[:, seen] - points[seen], axis=2).mean(axis=1) / size
    return result


def matched(there: Frame, here: Frame, distances: np.ndarray, last: dict[int, int]) -> dict[int, int]:
    """As CLEAR MOT: who is still near the old track keeps it, the others get the nearest."""
    match: dict[int, int] = {}
    for i, person in enumerate(there.ids):
        j = here.ids.index(last[person]) if last.get(person) in here.ids else -1
        if j >= 0 and distances[i, j] <= NEAR and j not in match.values():
            match[i] = j
    rows = [i for i in range(len(there.ids)) if i not in match]
    columns = [j for j in range(len(here.ids)) if j not in match.values()]
    if rows and columns:
        cost = np.where(distances[np.ix_(rows, columns)] <= NEAR, distances[np.ix_(rows, columns)], 1e6)
        match |= {rows[i]: columns[j] for i, j in zip(*linear_sum_assignment(cost), strict=True) if cost[i, j] < 1e6}
    return match


def best_pairs(pairs: dict[tuple[int, int], int]) -> int:
    persons, tracks = sorted({person for person, _ in pairs}), sorted({track for _, track in pairs})
    gain = np.zeros((len(persons), len(tracks)))
    for (person, track), count in pairs.items():
        gain[persons.index(person), tracks.index(track)] = count
    rows, columns = linear_sum_assignment(-gain)
    return int(gain[rows, columns].sum())


def of_keypoints(truth: list[Frame], found: list[Frame], matches: list[dict[int, int]]) -> tuple[float, float, float]:
    """Error, jitter and lag of visible keypoints; the last two where a person has one track for three frames."""
    errors, jitters, along, ways = [], [], 0.0, 0.0
    history: dict[int, list[tuple[int, int, np.ndarray, np.ndarray, np.ndarray]]] = {}
    for t, (there, here, match) in enumerate(zip(truth, found, matches, strict=True)):
        for i, j in match.items():
            seen = there.visible[i]  # type: ignore[index]
            error = here.keypoints[j] - there.keypoints[i]
            errors += np.linalg.norm(error[seen], axis=1).tolist()
            rows = history.setdefault(there.ids[i], [])
            rows.append((t, here.ids[j], error, seen, there.keypoints[i]))
            if len(rows) > 2 and rows[-3][0] == t - 2 and rows[-3][1] == rows[-2][1] == here.ids[j]:
                always = seen & rows[-2][3] & rows[-3][3]
                jitters += np.linalg.norm((error - 2 * rows[-2][2] + rows[-3][2])[always], axis=1).tolist()
                way = (there.keypoints[i] - rows[-3][4])[always] / 2
                along -= float((error[always] * way).sum())
                ways += float((way**2).sum())
    nothing = float("nan")
    return float(np.mean(errors)) if errors else nothing, float(np.mean(jitters)) if jitters else nothing, along / ways if ways else nothing
