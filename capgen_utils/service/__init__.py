"""A web service around captioners: uploads in, captions out; see ``create_app`` and ``capgen serve``."""

from capgen_utils.service.app import create_app as create_app
from capgen_utils.service.limits import Limits as Limits
from capgen_utils.service.limits import Protection as Protection
from capgen_utils.service.served import Served as Served
