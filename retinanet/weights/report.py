"""What loading a file of weights did, tensor by tensor."""

from dataclasses import dataclass, field


@dataclass
class Report:
    """Every tensor of the model is in exactly one of the first seven lists, every one of the file in `used`,
    `unused` or `unexpected`. Names are native but in those three, which hold names of the file.

    matched: copied as they are. converted: copied with other values (a folded norm, flipped colours, another order).
    reshaped: copied with another shape (rows of other classes). initialised: of parts that such a file does not hold
    (FPN and head, from an ImageNet model). reinitialised: the class layer, when the classes differ. missing: absent or
    of a wrong shape, and tolerated. refused: norm -> why the file's values have no meaning in it; its tensors keep
    their start values and are in `missing` too.
    used, unused (belong to the format, have no place here), unexpected: names of the file.
    notes: what the user should know, one sentence each. warnings: what contradicts the configuration.
    """

    source: str
    file: str
    matched: list[str] = field(default_factory=list)
    converted: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    reinitialised: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    used: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    _COUNTED = (
        ("matched", "matched"),
        ("converted", "converted"),
        ("reshaped", "reshaped"),
        ("initialised", "initialised (not in such a file)"),
        ("reinitialised", "re-initialised"),
        ("missing", "missing"),
        ("refused", "norms refused"),
        ("unexpected", "unexpected in the file"),
        ("unused", "of the file not needed"),
    )

    def summary(self) -> str:
        """Return the counts and the notes, for the console."""
        counts = [f"{len(getattr(self, name))} {words}" for name, words in self._COUNTED if getattr(self, name)]
        return "\n".join([f"weights: {self.file} ({self.source}): {', '.join(counts)}", *self.notes])

    def details(self) -> str:
        """Return every name under its heading, for the log."""
        lines = []
        for name, words in self._COUNTED:
            listed = getattr(self, name)
            shown = [f"{key}: {why}" for key, why in listed.items()] if isinstance(listed, dict) else sorted(listed)
            lines += [f"{words} ({len(listed)}):", *(f"  {entry}" for entry in shown)] if listed else []
        return "\n".join(lines)
