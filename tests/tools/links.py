"""The tags of a page, and the addresses that a browser would fetch for it."""

from html.parser import HTMLParser


class Links(HTMLParser):
    """Collects every address that a browser would fetch, and the tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        fetched = ("src", "href", "srcset", "data", "action")
        self.addresses += [value or "" for name, value in attrs if name in fetched]
