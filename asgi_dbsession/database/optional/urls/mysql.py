"""Translates options in a MySQL or MariaDB URL into options of the Python driver."""

from ssl import CERT_NONE, CERT_REQUIRED, SSLContext, create_default_context

from .options import UrlOptions, is_on, take_ssl_mode

_MODES = ("disable", "require", "verify-ca", "verify-full")


def for_mysql(options: UrlOptions) -> None:
    """Translate options in a URL for the drivers asyncmy, aiomysql and PyMySQL.

    For aiomysql, an option that requires TLS is an error: aiomysql would connect without TLS to a
    server that does not support TLS.
    """
    if (charset := options.take("encoding")) is not None:
        options.query["charset"] = charset
    mode = take_ssl_mode(options, _MODES)
    verify = options.take("ssl_verify_cert"), options.take("ssl_verify_identity")
    if mode is None and any(map(is_on, verify)):
        mode = "verify-full" if is_on(verify[1]) else "verify-ca"
    if mode == "disable" and options.driver == "pymysql":
        options.arguments["ssl_disabled"] = True
    elif mode not in (None, "disable"):
        if options.driver == "aiomysql":
            options.refuse(
                "ssl-mode",
                "aiomysql goes on unencrypted where the server offers no TLS: use asyncmy "
                '(`mysql+asyncmy://`), or write `connect_args={"ssl": context}` if that is enough.',
            )
        files = {name: options.take(f"ssl_{name}") for name in ("ca", "capath", "cert", "key")}
        options.arguments["ssl"] = _context(mode, files)


def _context(mode: str, files: dict[str, str | None]) -> SSLContext:
    """Make an SSL context that checks the server as the client `mysql` does with this `ssl-mode`.

    Source: https://dev.mysql.com/doc/refman/8.4/en/connection-options.html#option_general_ssl-mode
    """
    context = create_default_context(cafile=files["ca"], capath=files["capath"])
    context.check_hostname = mode == "verify-full"
    context.verify_mode = CERT_NONE if mode == "require" else CERT_REQUIRED
    if files["cert"] is not None:
        context.load_cert_chain(files["cert"], files["key"])
    return context
