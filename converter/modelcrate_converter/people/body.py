"""Figures in space: proportions, poses within the limits of joints, and where the joints then are.

Frame of a body: x to the person's own left, y down, z to the front; the origin is the middle of the hips, the unit is the body's standing height.
After `Pose.view` x is to the right of the image, y down and z towards the viewer; a person who faces the viewer has the left hand at the right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

Matrix: TypeAlias = "NDArray[np.float64]"
Vector: TypeAlias = tuple[float, float, float]

SIDES: Final = (1.0, -1.0)
"""Left, right: the sign of x in the body's frame."""

JOINTS: Final = (
    "pelvis", "neck", "head", "left_shoulder", "right_shoulder", "left_elbow", "right_elbow", "left_wrist", "right_wrist", "left_hand", "right_hand",
    "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle", "right_ankle", "left_toe", "right_toe", "left_heel", "right_heel",
    "nose", "left_eye", "right_eye", "left_ear", "right_ear", "mouth", "crown",
)  # fmt: skip
INDEX: Final = {name: i for i, name in enumerate(JOINTS)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Build:
    """Proportions of a body, as shares of its height.

    Attributes:
        torso: from the hips to the neck.
        shoulders: from the neck to a shoulder.
        hips: from the middle to a hip.
        upper_arm: shoulder to elbow.
        forearm: elbow to wrist.
        thigh: hip to knee.
        shank: knee to ankle.
        head: radius of the head.
        girth: factor on the thickness of everything.
    """

    torso: float
    shoulders: float
    hips: float
    upper_arm: float
    forearm: float
    thigh: float
    shank: float
    head: float
    girth: float

    @classmethod
    def sample(cls, rng: np.random.Generator) -> Build:
        """Adults mostly; some children, with larger heads and shorter legs."""
        is_child = rng.random() < 0.15
        vary = rng.uniform(0.92, 1.08, 9).tolist()
        legs = 0.9 if is_child else 1.0
        return cls(
            torso=0.295 * vary[0],
            shoulders=0.115 * vary[1],
            hips=0.055 * vary[2],
            upper_arm=0.170 * vary[3] * legs,
            forearm=0.150 * vary[4] * legs,
            thigh=0.245 * vary[5] * legs,
            shank=0.240 * vary[6] * legs,
            head=(0.088 if is_child else 0.070) * vary[7],
            girth=float(rng.uniform(0.85, 1.3)),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Limb:
    """The angles of an arm or a leg, in radians.

    Attributes:
        flexion: of the upper part to the front; 0 hangs down.
        abduction: of the upper part to its own side.
        bend: of elbow (forearm to the front) or knee (shank to the back).
        twist: turns the plane of the bend about the upper part, inwards.
    """

    flexion: float = 0.0
    abduction: float = 0.0
    bend: float = 0.0
    twist: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Pose:
    """How a body stands, sits, runs or lies, and from where it is seen. Angles in radians.

    Attributes:
        name: the kind of pose, for people who look at data.
        arms: left, right.
        legs: left, right.
        lean: of the torso to the front.
        tilt: of the torso to its left.
        head_yaw: of the head to the left of the body.
        head_pitch: of the head down.
        yaw: 0 faces the viewer, a quarter turn shows the left side.
        roll: turns the whole figure in the image, clockwise.
        elevation: how far the viewer looks from above.
    """

    name: str
    arms: tuple[Limb, Limb]
    legs: tuple[Limb, Limb]
    lean: float = 0.0
    tilt: float = 0.0
    head_yaw: float = 0.0
    head_pitch: float = 0.0
    yaw: float = 0.0
    roll: float = 0.0
    elevation: float = 0.1

    def view(self) -> Matrix:
        """(3, 3) body frame -> view frame."""
        return _rotation_z(self.roll) @ _rotation_x(self.elevation) @ _rotation_y(self.yaw)


def joints_in_view(build: Build, pose: Pose) -> Matrix:
    """(len(JOINTS), 3) positions in the view frame, in body heights, about the middle of the hips."""
    points = np.zeros((len(JOINTS), 3))
    torso = _rotation_z(pose.tilt) @ _rotation_x(-pose.lean)
    up = -torso[:, 1]
    neck = up * build.torso
    head = torso @ _rotation_y(pose.head_yaw) @ _rotation_x(-pose.head_pitch)
    center = neck + head @ np.array((0.0, -1.35 * build.head, 0.25 * build.head))
    points[INDEX["neck"]], points[INDEX["head"]] = neck, center
    # On the head: across, down and to the front, in radii.
    for name, place in _FACE.items():
        points[INDEX[name]] = center + head @ (np.array(place) * build.head)
    for side, limb, name in zip(SIDES, pose.arms, ("left", "right"), strict=True):
        shoulder = neck + torso @ np.array((side * build.shoulders, 0.025, 0.0))
        elbow = shoulder + torso @ np.array(_upper(limb, side)) * build.upper_arm
        forward = torso @ np.array(_lower(limb, side, to_the_front=True))
        wrist = elbow + forward * build.forearm
        for part, point in (("shoulder", shoulder), ("elbow", elbow), ("wrist", wrist), ("hand", wrist + forward * 0.045)):
            points[INDEX[f"{name}_{part}"]] = point
    for side, limb, name in zip(SIDES, pose.legs, ("left", "right"), strict=True):
        hip = np.array((side * build.hips, 0.01, 0.0))
        knee = hip + np.array(_upper(limb, side)) * build.thigh
        shank = np.array(_lower(limb, side, to_the_front=False))
        ankle = knee + shank * build.shank
        front = np.array((side * 0.25, 0.0, 1.0)) + 0.35 * shank
        front -= shank * (front @ shank)
        front /= math.sqrt(front @ front)
        toe = ankle + front * 0.095 + shank * 0.032
        for part, point in (("hip", hip), ("knee", knee), ("ankle", ankle), ("toe", toe), ("heel", ankle - front * 0.02 + shank * 0.03)):
            points[INDEX[f"{name}_{part}"]] = point
    return points @ pose.view().T


_FACE: Final = {
    "nose": (0.0, 0.12, 1.02),
    "left_eye": (0.36, -0.16, 0.86),
    "right_eye": (-0.36, -0.16, 0.86),
    "left_ear": (0.95, 0.02, -0.02),
    "right_ear": (-0.95, 0.02, -0.02),
    "mouth": (0.0, 0.52, 0.84),
    "crown": (0.0, -1.0, -0.1),
}


def _upper(limb: Limb, side: float) -> Vector:
    """Unit vector along the upper arm or thigh."""
    sine, cosine = math.sin(limb.abduction), math.cos(limb.abduction)
    return (side * sine, cosine * math.cos(limb.flexion), cosine * math.sin(limb.flexion))


def _lower(limb: Limb, side: float, *, to_the_front: bool) -> Vector:
    """Unit vector along the forearm or shank: the upper part's, turned by `bend` in a plane that `twist` turns inwards."""
    ux, uy, uz = _upper(limb, side)
    # How the upper part would move in flexion: it is perpendicular to it, whatever the pose.
    sign = 1.0 if to_the_front else -1.0
    fy, fz = -math.sin(limb.flexion) * sign, math.cos(limb.flexion) * sign
    # The third axis of the frame, upper x front, points to one side; `twist` leans the plane towards the middle of the body.
    cx, cy, cz = uy * fz - uz * fy, -ux * fz, ux * fy
    lean = -side if cx > 0 else side
    nx, ny, nz = (lean * math.sin(limb.twist) * cx, math.cos(limb.twist) * fy + lean * math.sin(limb.twist) * cy,
                  math.cos(limb.twist) * fz + lean * math.sin(limb.twist) * cz)  # fmt: skip
    cosine, sine = math.cos(limb.bend), math.sin(limb.bend)
    return (cosine * ux + sine * nx, cosine * uy + sine * ny, cosine * uz + sine * nz)


def _rotation_x(angle: float) -> Matrix:
    """Turns the front down for positive angles: z towards y."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array(((1.0, 0.0, 0.0), (0.0, c, s), (0.0, -s, c)))


def _rotation_y(angle: float) -> Matrix:
    """Turns the front to the left: z towards x."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array(((c, 0.0, s), (0.0, 1.0, 0.0), (-s, 0.0, c)))


def _rotation_z(angle: float) -> Matrix:
    """Turns x towards y: clockwise in the image."""
    c, s = math.cos(angle), math.sin(angle)
    return np.array(((c, -s, 0.0), (s, c, 0.0), (0.0, 0.0, 1.0)))


# ---------------------------------------------------------------------------------------------------------------------- poses


@dataclass(kw_only=True, slots=True)
class _Draw:
    """Random angles, asked for in degrees."""

    rng: np.random.Generator
    pool: list[float] = field(default_factory=list)

    def __call__(self, low: float, high: float) -> float:
        if not self.pool:
            self.pool = self.rng.random(64).tolist()
        return math.radians(low + (high - low) * self.pool.pop())

    def share(self) -> float:
        return self(0, 180) / math.pi


def sample_pose(rng: np.random.Generator) -> Pose:
    """A pose within the limits of human joints: standing, walking, running, reaching, sitting, crouching, jumping, lying."""
    draw = _Draw(rng=rng)
    name = str(rng.choice(_KINDS, p=_SHARES))
    arms, legs, lean = _arms(draw, name), _legs(draw, name), _lean(draw, name)
    # Half of the people face the viewer more or less, the others look anywhere.
    yaw = draw(-60, 60) if draw.share() < 0.55 else draw(-180, 180)
    roll = draw(-8, 8)
    if name == "lie":
        roll = (1 if draw.share() < 0.5 else -1) * draw(60, 115)
    return Pose(
        name=name, arms=arms, legs=legs, lean=lean, tilt=draw(-10, 10), head_yaw=draw(-45, 45), head_pitch=draw(-20, 25), yaw=yaw, roll=roll,
        elevation=draw(-5, 25),
    )  # fmt: skip


def walking_pose(phase: float, *, yaw: float, speed: float = 1.0) -> Pose:
    """One moment of a walk.

    Args:
        phase: of the stride, in radians; 2 pi is two steps.
        yaw: a quarter turn walks to the right of the image, minus a quarter to the left.
        speed: factor on the swing of the limbs.
    """
    swing = math.radians(26) * speed
    legs = []
    arms = []
    for sign in SIDES:
        wave = math.sin(phase) * sign
        lifted = max(0.0, math.cos(phase) * sign)
        legs.append(Limb(flexion=swing * wave, abduction=0.03, bend=math.radians(8) + math.radians(48) * lifted * speed))
        arms.append(Limb(flexion=-0.9 * swing * wave, abduction=0.12, bend=math.radians(20) + 0.3 * max(0.0, -wave), twist=0.2))
    return Pose(name="walk", arms=(arms[0], arms[1]), legs=(legs[0], legs[1]), lean=0.06, yaw=yaw, head_pitch=0.05, elevation=0.1, tilt=0.03 * math.sin(phase))


_KINDS: Final = ("stand", "walk", "run", "reach", "sit", "crouch", "jump", "lie")
_SHARES: Final = (0.24, 0.20, 0.12, 0.16, 0.10, 0.06, 0.06, 0.06)


def _arms(draw: _Draw, name: str) -> tuple[Limb, Limb]:
    def hanging() -> Limb:
        return Limb(flexion=draw(-20, 30), abduction=draw(3, 25), bend=draw(2, 45), twist=draw(0, 40))

    def akimbo() -> Limb:
        return Limb(flexion=draw(-30, 0), abduction=draw(30, 50), bend=draw(80, 110), twist=draw(70, 95))

    def raised() -> Limb:
        return Limb(flexion=draw(60, 175), abduction=draw(0, 50), bend=draw(0, 90), twist=draw(-20, 50))

    def spread() -> Limb:
        return Limb(flexion=draw(-20, 30), abduction=draw(45, 95), bend=draw(0, 80), twist=draw(-90, 60))

    def folded() -> Limb:
        return Limb(flexion=draw(10, 50), abduction=draw(5, 20), bend=draw(70, 130), twist=draw(20, 75))

    if name in {"walk", "run"}:
        size = 1.0 if name == "walk" else 1.8
        swing = draw(-30, 30) * size
        return (
            Limb(flexion=swing, abduction=draw(5, 18), bend=draw(10, 40) * size, twist=draw(0, 30)),
            Limb(flexion=-swing, abduction=draw(5, 18), bend=draw(10, 40) * size, twist=draw(0, 30)),
        )
    if name == "reach":
        kinds = [raised, spread, hanging, raised]
    elif name == "jump":
        kinds = [raised, spread]
    else:
        kinds = [hanging, hanging, hanging, akimbo, folded, spread]
    return tuple(kinds[int(draw.share() * len(kinds)) % len(kinds)]() for _ in SIDES)  # type: ignore[return-value]  # two sides, two limbs


def _legs(draw: _Draw, name: str) -> tuple[Limb, Limb]:
    if name in {"walk", "run"}:
        size = 1.0 if name == "walk" else 1.7
        front = draw(8, 34) * size
        ahead = Limb(flexion=front, abduction=draw(-2, 8), bend=draw(0, 35) * size)
        behind = Limb(flexion=-front * 0.8, abduction=draw(-2, 8), bend=draw(5, 55) * size)
        return (ahead, behind) if draw.share() < 0.5 else (behind, ahead)
    if name == "sit":
        lift = draw(70, 95)
        return tuple(Limb(flexion=lift + draw(-8, 8), abduction=draw(0, 28), bend=draw(60, 105)) for _ in SIDES)  # type: ignore[return-value]
    if name == "crouch":
        return tuple(Limb(flexion=draw(60, 115), abduction=draw(5, 35), bend=draw(90, 140)) for _ in SIDES)  # type: ignore[return-value]
    if name == "jump":
        return tuple(Limb(flexion=draw(-20, 70), abduction=draw(5, 40), bend=draw(20, 100)) for _ in SIDES)  # type: ignore[return-value]
    if name == "lie":
        return tuple(Limb(flexion=draw(-10, 45), abduction=draw(0, 20), bend=draw(0, 70)) for _ in SIDES)  # type: ignore[return-value]
    return tuple(Limb(flexion=draw(-8, 12), abduction=draw(0, 16), bend=draw(0, 15)) for _ in SIDES)  # type: ignore[return-value]


def _lean(draw: _Draw, name: str) -> float:
    if name == "run":
        return draw(5, 25)
    if name == "crouch":
        return draw(15, 55)
    if name == "sit":
        return draw(-15, 25)
    return draw(-8, 15)
