"""What a benchmark found, as text for people: machine, settings, a table for each task."""

FACTS = {
    "saved_mib": "saved for backward MiB", "detections_per_image": "detections per image", "last_loss": "loss",
    "kernel_ms": "kernels ms", "mfu": "MFU", "roofline": "roofline", "host_waits": "host waits",
    "data_wait": "data wait", "device_gap": "GPU without a step", "steps_images_per_s": "steps alone images/s",
    "of_steps": "of that", "max_difference": "largest difference of a metric",
}  # fmt: skip


def report(found: dict) -> str:
    """Return machine, settings, a table for each task and, where asked for, the kernels."""
    rows = found["results"]
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    parts = [heading(found), *(table([row for row in rows if row["task"] == task]) for task in tasks)]
    parts += [f"{row['task']}, {row['variant']}\n{row['kernels']}" for row in rows if "kernels" in row]
    return "\n\n".join(parts)


def heading(found: dict) -> str:
    """Return machine and settings as lines for people."""
    host = found["machine"]
    rates = found["results"][0]
    reached = "" if "mfu" not in rates else (
        f"MFU and roofline refer to what was reached here: {rates['tflops']:.3g} TFLOP/s, {rates['gb_per_s']:.3g} GB/s"
    )  # fmt: skip
    environment = " ".join(f"{name}={value}" for name, value in host["environment"].items())
    settings = ", ".join(f"{name} {value}" for name, value in found["settings"].items())
    loads = " to ".join("unknown" if load is None else f"{load:.2f}" for load in (host["load"], host["load_after"]))
    processor = f"{host['cpu']}, {host['capability']}, {host['cores']} cores, {host['threads']} threads, load {loads}"
    versions = ", ".join(f"{name} {host[name]}" for name in ("torch", "torchvision", "python"))
    lines = (
        found["command"], f"{host['date']}, {host['device']}; {processor}", versions, environment,
        host.get("tuned", ""), settings, reached,
    )  # fmt: skip
    return "\n".join(line for line in lines if line)


def short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def table(rows: list[dict]) -> str:
    """Return the rows of one task as Markdown."""
    facts = {key: title for key, title in FACTS.items() if any(key in row for row in rows)}
    header = [rows[0]["task"], "ms", "rounds", "ratio", "range", "images/s", "CPU ms", "ratio", "peak MiB", "ratio"]
    body = [
        [
            row["variant"],
            short(row["ms"]),
            f"{short(row['ms_low'])}-{short(row['ms_high'])}",
            f"{row['ratio']:.2f}",
            f"{row['ratio_low']:.2f}-{row['ratio_high']:.2f}",
            short(row["images_per_s"]),
            short(row["cpu_ms"]),
            f"{row['cpu_ratio']:.2f}",
            "-" if row["memory_mib"] is None else f"{row['memory_mib']:.0f}",
            "-" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}",
            *("-" if row.get(key) is None else short(row[key]) for key in facts),
        ]
        for row in rows
    ]
    lines = [[*header, *facts.values()], *body]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)
