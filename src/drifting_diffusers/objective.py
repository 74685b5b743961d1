r"""The training objective: images -> features -> field -> loss. One drift loss per feature map, summed (arXiv 2602.04770, section 3.4 and A.5)."""

import copy
import dataclasses
import hashlib
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from .comparison import Pair, waves
from .comparison import compare as compare_features
from .encoded import Encoded, Readings, Samples, distinct_of, halves_of, in_pieces
from .features import FeatureMap, compile_networks, networks_of
from .fields import DriftingField, Field, Mean, Observer, Situation, batch_mean, memories, read_field, situated, spell
from .fields.situation import walk
from .losses import NonFinite, drift_loss
from .shapes import Float


@dataclass(frozen=True)
class Measured:
    """What one feature map saw in a step: its loss (flat by construction), mean distance [], and strength per temperature [t]."""

    loss: Tensor
    distance: Tensor
    strength: Tensor


class DriftingObjective:
    """The sum of the drift losses of all features.

    Every location of a feature map is a problem of its own; its length unit and strengths are shared by all locations and labels of the step.

    Args:
        features: one feature map or several whose names differ; `Pixels` alone is the loss without an encoder. An encoder stands for its
            `activations`.
        field: the drifting field, or its name as `read_field` takes it. Not given, it is that of a run's config, or else the released one.
    """

    def __init__(self, features: FeatureMap | Sequence[FeatureMap], field: Field | str | None = None):
        given = list(features) if isinstance(features, Sequence) and not isinstance(features, nn.Module) else [features]
        self.feature_maps: list[Any] = [getattr(feature_map, "activations", feature_map) for feature_map in given]
        self._chosen = read_field(field) if isinstance(field, str) else field
        self.field: Field = DriftingField() if self._chosen is None else self._chosen
        self.ignored: set[str] = set()
        self._packed: dict[str, tuple[int, ...]] = {}  # shapes of the maps in a packed vector
        self._unpacked: Readings = {}  # what is read of them
        if not self.feature_maps:
            raise ValueError("an objective needs at least one feature map; `Pixels()` is the simplest")

    def describe(self) -> dict[str, Any]:
        """What is compared and how, as JSON that is the same in every process."""
        return {"features": [described(feature_map) for feature_map in self.feature_maps], "field": described(self.field)}

    def settle_field(self, name: str | None) -> str | None:
        """Agree with a run's config, which may name the field, and return the field's name, or None for one that has none.

        Raises:
            ValueError: if both were chosen, differently.
        """
        if self._chosen is None:
            self.field = DriftingField() if name is None else read_field(name)
        elif name is not None and read_field(name) != self._chosen:
            raise ValueError(f"the objective's field is {self._chosen}, and the config's {name}; leave one of them out")
        try:
            return spell(self.field)
        except LookupError:  # a field of the user's own
            return None

    def state_dict(self) -> dict[str, Any]:
        """What the field remembers, if it does."""
        return {"memories": [memory.state_dict() for memory in memories(self.field)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        mine = list(memories(self.field))
        if len(mine) != len(state["memories"]):
            raise ValueError(
                f"the checkpoint holds {len(state['memories'])} memories of a field, and this field has {len(mine)}; take the field of that run"
            )
        for memory, there in zip(mine, state["memories"], strict=True):
            memory.load_state_dict(there)

    def try_field(self, generated: int, positives: int, unconditional: int) -> None:
        """Call the field once with as many samples per label as a step has, so that what it refuses is refused before any work.

        Raises:
            ValueError: with what the field said.
        """
        rng = torch.Generator().manual_seed(0)
        x, real, others = (torch.randn(2, n, 4, generator=rng) for n in (generated, positives, unconditional))
        field = situated(copy.deepcopy(self.field), Situation(0, 1))
        try:
            drift_loss(x, real, others if unconditional else None, field=field)
        except Exception as error:
            raise ValueError(
                f"the field cannot be called with {generated} generated, {positives} real and {unconditional} unconditional samples per label: "
                f"{type(error).__name__}: {error}"
            ) from error

    @property
    def clamped(self) -> dict[str, float]:
        """What fields count of queries that they could not serve as they should, as shares; see `NystromField.report`."""
        shares = [part.report.share for part in walk(self.field) if hasattr(part, "report")]
        return {"clamped": max(shares)} if shares else {}

    @property
    def observers(self) -> list[Observer]:
        """What of the field wants to see all real samples once, before the first step."""
        return [memory for memory in memories(self.field) if isinstance(memory, Observer)]

    @torch.no_grad()
    def observe(self, images: Float[Tensor, "n c h w"], labels: Tensor | None = None) -> None:
        """Show real samples, and the class of each, to the field's memory."""
        for name, values in self.features(images).items():
            for observer in self.observers:
                observer.observe(name, values, labels)

    def freeze(self, device: torch.device) -> None:
        """Bring encoders among the feature maps to the device, into evaluation mode and out of training."""
        for network in self.networks:
            network.to(device).eval().requires_grad_(False)

    def arrange(self, *, channels_last: bool, compiled: bool) -> None:
        """Lay out the weights of convolutions with channels last in memory; compile networks in place, so that their weights keep their names.

        Raises:
            ValueError: where there is nothing to do it to.
        """
        convolutions = [network for network in self.networks if any(p.ndim == 4 for p in network.parameters())]
        if channels_last and not convolutions:
            raise ValueError("channels_last is of convolutions, and no feature map here has one with weights: leave it out")
        for network in convolutions if channels_last else ():
            cast(Any, network).to(memory_format=torch.channels_last)
        if compiled and not any([compile_networks(feature_map) for feature_map in self.feature_maps]):
            raise ValueError("compile_features is of networks, and no feature map here has one with weights: leave it out")

    @property
    def networks(self) -> list[nn.Module]:
        """Every network among the feature maps, however it is wrapped; see `networks_of`."""
        found = {id(network): network for feature_map in self.feature_maps for network in networks_of(feature_map)}
        return list(found.values())

    def features(self, images: Float[Tensor, "n c h w"]) -> dict[str, Float[Tensor, "n l d"]]:
        """All features of the images by name, in float32: distances underflow in 16 bits."""
        found: dict[str, Tensor] = {}
        with torch.autocast(images.device.type, enabled=False):
            for feature_map in self.feature_maps:
                new = feature_map(images.float())
                _check_repeated(found, new)
                found |= new
        return {name: values for name, values in found.items() if name not in self.ignored}

    @torch.no_grad()
    def ignore_constant(self, images: Float[Tensor, "n c h w"]) -> list[str]:
        """Leave out, from now on, every feature that is the same for all these images, and return their names.

        A feature that carries nothing (a standard deviation over one pixel, a mean after a GroupNorm of one channel) has distances of rounding
        noise, and the field would blow that noise up to unit strength.
        """
        self.ignored = set()
        found = self.features(images)
        constant = [name for name, values in found.items() if bool(values.std(dim=0).amax() <= 1e-5 * values.abs().amax().clamp(min=1e-12))]
        if len(constant) == len(found):
            raise ValueError(f"every feature is the same for all {len(images)} images: {constant}; there is nothing to learn from")
        self.ignored = set(constant)
        return constant

    @torch.no_grad()
    def pack(self, images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n f"]:
        """What all features of each image are read from, as one vector, for a bank that keeps it instead of images. Exact while feature maps are frozen."""
        maps, readings = self._maps(images)
        self._packed, self._unpacked = {key: tuple(values.shape[1:]) for key, values in maps.items()}, readings
        return torch.cat([values.flatten(1) for values in maps.values()], dim=1)

    def _maps(self, images: Float[Tensor, "n c h w"]) -> tuple[dict[str, Tensor], Readings]:
        """What a network computes of images, by name, and what `features` reads of it."""
        maps, readings = dict[str, Tensor](), Readings()
        if type(self).features is not DriftingObjective.features:  # of a subclass: what it says holds
            maps = self.features(images)
            return maps, {name: (name, _as_it_is) for name in maps}
        with torch.autocast(images.device.type, enabled=False):
            for i, feature_map in enumerate(self.feature_maps):
                compute, read = halves_of(feature_map)
                new = {f"{i}/{key}": (key, values) for key, values in compute(images.float()).items()}
                read_of = {name: (at, how) for at, (key, values) in new.items() for name, how in read(key, values).items()}
                _check_repeated(readings, read_of)
                readings |= {name: how for name, how in read_of.items() if name not in self.ignored}
                maps |= {at: values for at, (_, values) in new.items()}
        wanted = {at for at, _ in readings.values()}
        return {at: values for at, values in maps.items() if at in wanted}, readings

    def __call__(
        self,
        generated: Float[Tensor, "l n c h w"],
        positives: Samples,
        negatives: Samples | None = None,
        negative_weights: Float[Tensor, " l"] | None = None,
        mean: Mean = batch_mean,
        situation: Situation = Situation(),
    ) -> tuple[Float[Tensor, ""], dict[str, Measured]]:
        """The loss of a step over l labels, and what each feature measured. Differentiable in `generated` only.

        Real images are encoded in inference mode, after the generated ones, and `Repeated` ones once.

        Args:
            generated: n samples per label.
            positives: p real images per label, [l, p, c, h, w], or packed, [l, p, f].
            negatives: m unconditional real images per label, or packed.
            negative_weights: the mass of each label's negatives; see `unconditional_weight`.
            mean: how means over the whole step are taken.
            situation: the step and its labels, for fields that change over a run or remember classes.
        """
        moved = self.problems(generated)  # first: what feature maps remember for later calls is made outside of inference mode
        attracting, repelling = self.encode(positives), {} if negatives is None else self.encode(negatives)
        return self.compare(moved, attracting, repelling, negative_weights, mean=mean, situation=situation)

    def encode(self, samples: Samples, *, at_once: int | None = None) -> Encoded:
        """`problems` of real samples, without a graph, every distinct one encoded once. Each feature is made when it is read.

        Args:
            samples: images [l, n, c, h, w], or packed, [l, n, f].
            at_once: images in a network at once; all if not given.

        Their maps are kept in the precision of the network.
        """
        distinct, places = distinct_of(samples)
        look = self._unpack if samples.ndim == 3 else self._maps
        with torch.inference_mode():
            maps, readings = in_pieces(lambda part: look(distinct[part]), len(distinct), at_once or len(distinct))
        return Encoded(maps, readings, places)

    @torch.no_grad()
    def encode_pieces(self, generate: Callable[[slice], Float[Tensor, "l n c h w"]], labels: int, size: int) -> Encoded:
        """`problems` of generated samples without a graph, made for a few labels at a time."""
        maps, readings = in_pieces(lambda part: self._maps(generate(part).flatten(0, 1)), labels, size)
        count = len(next(iter(maps.values())))
        return Encoded(maps, readings, torch.arange(count).unflatten(0, (labels, -1)))

    def problems(self, samples: Tensor) -> dict[str, Float[Tensor, "b n d"]]:
        """Features of images [l, n, c, h, w], or of packed ones [l, n, f], by name: one problem per (label, location), labels first."""
        if samples.ndim == 3:
            maps, readings = self._unpack(samples.flatten(0, 1))
            found = {name: read(maps[key]) for name, (key, read) in readings.items()}
        else:
            found = self.features(samples.flatten(0, 1))
        return {name: values.unflatten(0, samples.shape[:2]).transpose(1, 2).flatten(0, 1) for name, values in found.items()}

    def compare(
        self,
        generated: Mapping[str, Float[Tensor, "b n d"]],
        positives: Mapping[str, Float[Tensor, "b p d"]],
        negatives: Mapping[str, Float[Tensor, "b m d"]],
        negative_weights: Float[Tensor, " l"] | None = None,
        *,
        mean: Mean = batch_mean,
        situation: Situation = Situation(),
    ) -> tuple[Float[Tensor, ""], dict[str, Measured]]:
        """`__call__` on features that are there already, as `problems` makes them; no negatives are an empty mapping.

        Raises:
            NonFinite: with the name of the first feature that holds NaN or infinite values.
        """
        total, measured = torch.zeros(()), {}
        failed: NonFinite | None = None
        for wave in waves(self._pairs(generated, positives, negatives, negative_weights, situation), mean):
            wave_total, wave_measured, error = _outcome(wave, mean)
            total, measured, failed = total.to(wave_total.device) + wave_total, measured | wave_measured, failed or error
        if failed is not None:  # in the end: every process asks for as many means, whatever it meets
            raise failed
        return total, measured

    def _pairs(
        self,
        generated: Mapping[str, Tensor],
        positives: Mapping[str, Tensor],
        negatives: Mapping[str, Tensor],
        negative_weights: Tensor | None,
        situation: Situation,
        take: Callable[[Mapping[str, Tensor], str], Tensor] = operator.getitem,
    ) -> Iterator[Pair]:
        """Every feature of a step, read when it is asked for."""
        for name in list(generated):
            values, others, weights = take(generated, name), take(negatives, name) if name in negatives else None, None
            if others is not None and negative_weights is not None:
                each = len(values) // len(negative_weights)  # locations
                weights = negative_weights.float().repeat_interleave(each)[:, None].expand(others.shape[:2])
            field = situated(self.field, dataclasses.replace(situation, feature=name))
            yield Pair(name, values, take(positives, name), others, weights, field)

    def slopes(
        self,
        generated: Mapping[str, Float[Tensor, "b n d"]],
        positives: Mapping[str, Float[Tensor, "b p d"]],
        negatives: Mapping[str, Float[Tensor, "b m d"]],
        negative_weights: Float[Tensor, " l"] | None = None,
        *,
        mean: Mean = batch_mean,
        situation: Situation = Situation(),
    ) -> tuple[dict[str, Float[Tensor, "b n d"]], Float[Tensor, ""], dict[str, Measured]]:
        """The gradient of `compare` in the generated features, its value, and what each feature measured.

        With these slopes g fixed, the gradient of sum(g * features) is that of the loss. So a step whose activations do not fit into memory is taken in
        two passes: features of all labels without a graph, then pieces of the labels one by one, each against its slopes. One feature is compared at a
        time; mappings that can are emptied on the way, so that features and slopes are not in memory together.
        """
        found, measured, total = {}, {}, torch.zeros(())
        failed: NonFinite | None = None
        take = lambda mapping, name: mapping.pop(name) if isinstance(mapping, dict) else mapping[name]
        for wave in waves(self._pairs(generated, positives, negatives, negative_weights, situation, take), mean):
            with torch.enable_grad():
                leaves = [dataclasses.replace(pair, generated=pair.generated.detach().requires_grad_()) for pair in wave]
                wave_total, wave_measured, error = _outcome(leaves, mean)
                names = [pair.name for pair in leaves if pair.name in wave_measured]
                if error is None:
                    gradients = torch.autograd.grad(wave_total, [pair.generated for pair in leaves])
                    found |= dict(zip(names, gradients, strict=True))
            total, measured, failed = total.to(wave_total.device) + wave_total.detach(), measured | wave_measured, failed or error
        if failed is not None:  # as in `compare`
            raise failed
        return found, total, measured

    def steep(
        self,
        generated: Float[Tensor, "l n c h w"],
        positives: Float[Tensor, "l p *image"],
        negatives: Float[Tensor, "l m *image"] | None = None,
        negative_weights: Float[Tensor, " l"] | None = None,
        situation: Situation = Situation(),
    ) -> list[str]:
        """The features whose part of the gradient in the generated images is not finite, though all values are: a root at 0, a division by it."""
        looking = copy.copy(self)
        looking.field = copy.deepcopy(self.field)  # what is only looked at is not remembered
        return looking._steep(generated, positives, negatives, negative_weights, situation)

    def _steep(
        self, generated: Tensor, positives: Tensor, negatives: Tensor | None, weights: Tensor | None, situation: Situation
    ) -> list[str]:
        with torch.enable_grad():
            images = generated.detach().requires_grad_()
            features = self.problems(images)
            with torch.no_grad():
                repelling = {} if negatives is None else self.problems(negatives)
                attracting = self.problems(positives)
            slopes, _, _ = self.slopes({**features}, attracting, repelling, weights, situation=situation)
            part = lambda name: torch.autograd.grad((features[name] * slopes[name]).sum(), images, retain_graph=True)[0]
            return [name for name in features if not bool(torch.isfinite(part(name)).all())]

    def _unpack(self, vectors: Float[Tensor, "n f"]) -> tuple[dict[str, Tensor], Readings]:
        sizes = [math.prod(shape) for shape in self._packed.values()]
        if sum(sizes) != vectors.shape[1]:
            raise ValueError(
                f"packed features have {sum(sizes)} numbers per image here, got {vectors.shape[1]}; pack them with this objective"
            )
        parts = vectors.split(sizes, dim=1)
        return {key: part.unflatten(1, shape) for (key, shape), part in zip(self._packed.items(), parts, strict=True)}, self._unpacked


def _as_it_is(values: Tensor) -> Tensor:
    return values


def _check_repeated(found: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    if repeated := found.keys() & new.keys():
        raise ValueError(f"two feature maps give {sorted(repeated)}; names must differ")


def _outcome(wave: Sequence[Pair], mean: Mean) -> tuple[Tensor, dict[str, Measured], NonFinite | None]:
    """The sum of the losses of some features, what each measured, and the first that is not finite."""
    total, measured = torch.zeros((), device=wave[0].generated.device), {}
    failed: NonFinite | None = None
    for pair, result in zip(wave, compare_features(wave, mean), strict=True):
        if isinstance(result, NonFinite):
            failed = failed or NonFinite(f"feature {pair.name!r}: {result}")
            continue
        losses, drift = result
        loss = losses.mean()
        total = total + loss
        measured[pair.name] = Measured(loss.detach(), drift.distance, drift.strength)
    return total, measured, failed


def described(value: Any) -> Any:
    """A choice as JSON: dataclasses by their fields, functions by their names, modules by their structure and a few of their weights."""
    if dataclasses.is_dataclass(value):
        return {"class": type(value).__qualname__} | {
            f.name: described(getattr(value, f.name)) for f in dataclasses.fields(value) if f.compare
        }
    if isinstance(value, nn.Module):
        digest = hashlib.sha256()
        for tensor in value.state_dict().values():
            digest.update(tensor.flatten()[:16].double().cpu().numpy().tobytes())
        return {"module": repr(value), "weights": digest.hexdigest()[:16]}
    if isinstance(value, tuple | list):
        return [described(item) for item in value]
    if callable(value) and not isinstance(value, type) and not hasattr(value, "__qualname__"):  # an object of the user's own
        plain = {key: item for key, item in vars(value).items() if isinstance(item, bool | int | float | str | tuple | list | None)}
        return {"class": type(value).__qualname__} | {key: described(item) for key, item in plain.items()}
    if callable(value):
        owner = getattr(value, "__self__", None)
        name = getattr(value, "__qualname__", type(value).__qualname__)
        return {"of": described(owner), "method": name} if isinstance(owner, nn.Module) else name
    return value
