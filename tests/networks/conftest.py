import urllib.error

import pytest
import torch


@pytest.fixture
def no_network(monkeypatch):
    def fail(*_, **__):
        raise urllib.error.URLError("no route\nto host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fail)
