"""The HTML pages and their HTTP headers. A page loads nothing else, except for logo.svg."""

import base64
import hashlib
import json
import re
from pathlib import Path

HERE = Path(__file__).with_name("serve")


def content_policy(html, connect="'self'"):
    """A content security policy: only the page's own scripts and styles may run, and only connect to `connect`."""

    def hashes(tag):
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; img-src 'self' data:; "
    return policy + f"connect-src {connect}; base-uri 'none'; form-action 'none'"


def page_headers(html):
    """HTTP headers of a page that only runs its own scripts and that no other page may embed."""
    policy = f"{content_policy(html)}; frame-ancestors 'none'"
    return {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


def html_page(name, data=None):
    """
    The HTML of the page `name`. Comments like /* look.js */ are replaced by the files they name.

    With `data`, JSON, it is one file that makes no request, with a policy of its own.
    """
    html = (HERE / name).read_text(encoding="utf-8")
    html = re.sub(r"/\* (\w+\.(?:css|js)) \*/", lambda match: (HERE / match[1]).read_text(encoding="utf-8"), html)
    if data is None:
        return html
    policy, text = content_policy(html, connect="'none'"), json.dumps(data).replace("<", "\\u003c")
    html = html.replace("<head>", f'<head>\n<meta http-equiv="Content-Security-Policy" content="{policy}">', 1)
    return html.replace("<!-- data -->", f'<script type="application/json" id="data">{text}</script>', 1)
