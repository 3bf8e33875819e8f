"""docs/adding-a-policy.md, word for word."""

import re

from processes import ROOT
from walkthrough import Place, read_document


def test_the_package_of_the_document_serves_its_policy(place: Place):
    """Built, installed, found by its entry point, served, asked, and tested as its reader does it."""
    document = read_document("adding-a-policy.md")
    build, install, make, serve, ask, test = document.commands
    place.write(document.files)
    for command in (build, install, make):
        place.run(command)
    assert "--port 8000" in serve
    with place.start(serve.replace("8000", "0")) as server:
        port = server.wait_for(r"Waiting for client connections at ws://0\.0\.0\.0:(\d+)")[1]
        assert "✓ policy 'linear' of a plug-in from" in server.output
        printed = place.run(ask.replace("8000", port)).splitlines()[-1]
    # What the document says it prints.
    text = (ROOT / "docs" / "adding-a-policy.md").read_text(encoding="utf-8")
    promised = re.search(r"It prints `(.+?)`\.", text)
    assert promised is not None
    assert printed == promised[1]
    assert "3 passed" in place.run(test)
