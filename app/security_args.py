"""Who may do what over HTTP (``security`` in the args of ``serve_config.yaml``)."""

from __future__ import annotations

from app.api_keys import ApiKeys
from app.guards import RouteGuards
from app.key_guards import LiveKeys, key_guards
from app.strict import Strict
from cache_actors.home import Home


class SecurityArgs(Strict):
    """Access to the routes that write or steer."""

    require_keys: bool = False
    """Whether feedback and administration need an API key (`marm keys create`). Off for a demo on
    one machine; on in every configuration in cluster/."""

    def guards(self, home: Home) -> RouteGuards:
        """The checks in front of the routes.

        Raises:
            KeyFileError: the file of keys is there and can't be understood.
        """
        return key_guards(LiveKeys(ApiKeys(home)), self.require_keys)
