"""What training took, and a rough guess at what that emitted."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from screformer.model_cards.checkpoint_records import Checkpoint, Json
from screformer.model_cards.markdown import format_value, plain, table

# Typical power of a device in W, its makers' figures; the rest of a computer and its cooling are not in it.
DEVICE_WATTS = {
    "B200": 1000, "H200": 700, "H100": 700, "A100": 400, "L40S": 350, "L40": 300, "V100": 300, "A40": 300, "A30": 165,
    "A10G": 150, "A10": 150, "L4": 72, "T4": 70, "A6000": 300, "4090": 450, "3090": 350, "5090": 575,
}  # fmt: skip
WATTS_A_THREAD = 10
GRAMS_A_KWH = 480  # of CO2, the world's electricity in 2023 by Ember's Global Electricity Review 2024


class Emissions(NamedTuple):
    """A guess at what a run emitted.

    Attributes
    ----------
    grams
        Of CO2.
    watts
        That were assumed.
    """

    grams: float
    watts: float


def estimate_emissions(resources: Json) -> Emissions | None:
    """Return the guess of ``resources.json``; None where the device's power or the time is not known."""
    device, hours = resources.get("device", {}), resources.get("hours")
    if hours is None:
        return None
    if device.get("type") == "cpu":
        watts: float | None = WATTS_A_THREAD * device["threads"]
    else:
        words = re.split(r"[\s-]+", str(device.get("name")))
        watts = next((power for name, power in DEVICE_WATTS.items() if name in words), None)
    if watts is None:
        return None
    watts *= device.get("number", 1)
    return Emissions(watts / 1000 * hours * GRAMS_A_KWH, watts)


def cost_section(checkpoint: Checkpoint) -> str:
    """Return time, device and memory of the training, and the guess at its emissions."""
    found = checkpoint.resources
    if not found:
        return "What the training took is not recorded."
    device, memory = found["device"], found["peak_memory_gb"]
    threads = f", {device['threads']} threads" if "threads" in device else ""
    rows: dict[str, object] = {
        "Device": f"{device.get('number', 1)} x {device['name']}{threads}",
        "Hours": round(found["hours"], 3),
        "Peak memory, GB": memory["gpu"] if memory.get("gpu") is not None else memory["process"],
        "Cells read": found["cells"],
        "Trained values": found["parameters"],
        "Precision": found["precision"],
    }
    return "\n\n".join(
        [
            table(("Of this run", "Value"), ((name, plain(format_value(value))) for name, value in rows.items())),
            _emissions_sentence(estimate_emissions(found), found.get("task")),
        ]
    )


def _emissions_sentence(emissions: Emissions | None, task: str | None) -> str:
    if emissions is None:
        return "What it emitted cannot be guessed: this package has no figure of the device's power."
    without = "Searches" if task == "pretraining" else "Pretraining, searches"
    return (
        f"About {emissions.grams:,.3g} g of CO2, a rough guess: {emissions.watts:,.0f} W for the time of the training, "
        f"and {GRAMS_A_KWH} g a kWh, the world's mean. {without} and failed runs are not in it."
    )


def emissions_metadata(checkpoint: Checkpoint) -> dict[str, Any] | None:  # Any: YAML
    """Return the field ``co2_eq_emissions`` of a card on the Hub."""
    emissions = estimate_emissions(checkpoint.resources)
    if emissions is None:
        return None
    return {
        "emissions": float(f"{emissions.grams:.3g}"),
        "source": "power of the device and the world's mean emissions, a rough guess",
        "training_type": str(checkpoint.resources["task"]),
        "hardware_used": str(checkpoint.resources["device"]["name"]),
    }
