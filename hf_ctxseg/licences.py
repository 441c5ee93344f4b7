"""Licences of data as a model card and a LICENSE notice name them."""

import re
from typing import NamedTuple

# Identifiers that the Hub knows and that data sets for segmentation carry; it refuses a card with any other.
HUB_LICENSES = frozenset(
    "apache-2.0 mit bsd-2-clause bsd-3-clause cc0-1.0 cc-by-2.0 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0"
    " cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0"
    " cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 gpl-2.0 gpl-3.0 agpl-3.0 lgpl-3.0 mpl-2.0 odbl odc-by pddl unlicense".split()
)
_PARTS = {"by": "Attribution", "nc": "NonCommercial", "sa": "ShareAlike", "nd": "NoDerivatives"}
_PORTS = {"2.0": "Generic", "3.0": "Unported", "4.0": "International"}
_OTHERS = {
    "apache-2.0": ("Apache License 2.0", "https://www.apache.org/licenses/LICENSE-2.0"),
    "cc0-1.0": ("Creative Commons Zero 1.0 Universal", "https://creativecommons.org/publicdomain/zero/1.0/"),
    "mit": ("MIT License", "https://opensource.org/license/mit"),
    "odbl": ("Open Database License 1.0", "https://opendatacommons.org/licenses/odbl/1-0/"),
    "odc-by": ("Open Data Commons Attribution License 1.0", "https://opendatacommons.org/licenses/by/1-0/"),
    "pddl": ("Public Domain Dedication and License 1.0", "https://opendatacommons.org/licenses/pddl/1-0/"),
}


class Licence(NamedTuple):
    """A licence's full name, and where its text is; empty where that is not known here."""

    name: str
    link: str


def find_licence(stated: str) -> Licence:
    """Give the full name and the address of a licence.

    Args:
        stated: As the user stated it: an identifier of the Hub, an address, or any words.
    """
    key = _identifier(stated)
    if found := re.fullmatch(r"cc-(by(?:-nc)?(?:-sa|-nd)?)-(2\.0|3\.0|4\.0)", key):
        parts = "-".join(_PARTS[part] for part in found[1].split("-"))
        link = f"https://creativecommons.org/licenses/{found[1]}/{found[2]}/"
        return Licence(f"Creative Commons {parts} {found[2]} {_PORTS[found[2]]}", link)
    if key in _OTHERS:
        return Licence(*_OTHERS[key])
    return Licence(stated.strip(), stated.strip() if re.fullmatch(r"https?://\S+", stated.strip()) else "")


def header_fields(stated: str | None) -> dict[str, str]:
    """The fields `license`, `license_name` and `license_link` of a card's header; none if no licence is stated."""
    if not stated or not stated.strip():
        return {}
    if _identifier(stated) in HUB_LICENSES:
        return {"license": _identifier(stated)}
    name, link = find_licence(stated)
    slug = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "other"
    return {"license": "other", "license_name": slug, **({"license_link": link} if link else {})}


def _identifier(stated: str) -> str:
    """`CC BY-NC 4.0` as `cc-by-nc-4.0`."""
    return "-".join(stated.lower().split())
