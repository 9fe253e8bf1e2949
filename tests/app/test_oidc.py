"""Tokens of an identity provider: which open the service, which project, and what if it is away."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import jwt
import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from app.access import issuer as keys_of_issuer
from app.main import create_app
from app.settings import Settings
from tests.app.conftest import make_settings, serve
from tests.app.issuer import ALGORITHMS, AUDIENCE, KINDS, Issuer, issuing
from tests.app.keys import audited, bearer, make_key, operator
from tests.app.service import Service, ok


@pytest.fixture
def issuer() -> Iterator[Issuer]:
    with issuing() as issuer:
        yield issuer


@pytest.fixture
def settings(tmp_path: Path, migrated_sqlite_url: str, issuer: Issuer) -> Settings:
    return make_settings(
        tmp_path, migrated_sqlite_url, auth="key", oidc_issuer=issuer.url, oidc_audience=AUDIENCE,
        oidc_groups="/ml/search=search:viewer,ml-admins=other:admin,leads=search:admin",
        failed_keys_per_minute=1000,
    )  # fmt: skip


def get(service: Service, token: str, path: str = "/quota", **headers: str) -> httpx2.Response:
    return service.http.get(path, headers=bearer(token) | headers)


def refusal(service: Service, token: str) -> str:
    response = get(service, token)
    problem = ok(response, 401)
    assert response.headers["www-authenticate"].startswith("Bearer")
    return str(problem["detail"])


class TestTokens:
    @pytest.mark.parametrize("algorithm", KINDS)
    def test_one_of_each_algorithm_opens_its_project(
        self, service: Service, issuer: Issuer, algorithm: str
    ) -> None:
        issuer.add("k2", algorithm)
        assert ok(get(service, issuer.sign("k2")), 200)["project"] == "search"

    def test_keys_and_the_operator_go_on_beside_them(self, service: Service) -> None:
        key = make_key(service, "other")["key"]
        assert ok(get(service, key), 200)["project"] == "other"

    def test_one_that_is_wrong_in_one_thing_does_not(
        self, service: Service, issuer: Issuer
    ) -> None:
        now = int(time.time())
        wrong: dict[str, dict[str, Any]] = {
            "it was made for another service": {"aud": "grafana"},
            "another issuer made it": {"iss": f"{issuer.url}/"},
            "it has expired": {"exp": now - 31},
            "it is not valid yet": {"nbf": now + 60},
        }
        for why, claims in wrong.items():
            assert why in refusal(service, issuer.sign("k1", **claims)), why
        for name in ("exp", "aud", "iss", "sub"):
            assert "not valid" in refusal(service, issuer.sign("k1", **{name: None})), name
        assert "not valid" in refusal(service, issuer.sign("k1", sub=7))
        assert "not valid" in refusal(service, issuer.sign("k1", exp="tomorrow"))
        token = issuer.sign("k1")
        assert "not valid" in refusal(service, token[:-4] + "AAAA")
        assert "not valid" in refusal(service, "a.b.c")
        assert "too long" in refusal(service, token + "a" * (16 << 10))
        assert ok(get(service, token), 200)

    def test_clocks_may_differ_by_half_a_minute(self, service: Service, issuer: Issuer) -> None:
        now = int(time.time())
        wrong_clocks: list[dict[str, Any]] = [
            {"exp": now - 15}, {"nbf": now + 15}, {"iat": now + 15},
        ]  # fmt: skip
        for claims in wrong_clocks:
            assert ok(get(service, issuer.sign("k1", **claims)), 200), claims

    def test_one_that_was_taken_a_moment_ago_expires_all_the_same(
        self, service: Service, issuer: Issuer
    ) -> None:
        assert get(service, issuer.sign("k1")).status_code == 200  # the issuer's keys are known
        token = issuer.sign("k1", exp=int(time.time()) - 27)
        assert get(service, token).status_code == 200
        deadline = time.monotonic() + 10
        while get(service, token).status_code == 200:
            assert time.monotonic() < deadline

    def test_the_key_says_which_algorithm_and_not_the_token(
        self, service: Service, issuer: Issuer
    ) -> None:
        issuer.add("rsa", "RS256")
        public = ALGORITHMS["RS256"].from_jwk(json.dumps(issuer.published[-1]))
        payload = jwt.decode(issuer.sign("rsa"), options={"verify_signature": False})
        for algorithm in ("none", "None", "HS256", "HS512", "RS384", "PS256", "ES384"):
            forged = sign_as(algorithm, payload, public, issuer.keys["rsa"][1])
            assert "not valid" in refusal(service, forged), algorithm

    def test_keys_that_are_not_for_this_are_not_used(
        self, service: Service, issuer: Issuer
    ) -> None:
        issuer.add("encrypts", "RS256", use="enc")
        issuer.add("other", "RS256", alg="RS512")
        issuer.published.append({"kid": "shared", "kty": "oct", "k": "c2VjcmV0"})
        issuer.published += [{"kid": "broken", "kty": "RSA", "n": "!"}, {"kty": "EC"}]
        for key_id in ("encrypts", "other"):
            assert "no such key" in refusal(service, issuer.sign(key_id))
        header = {"alg": "HS256", "kid": "shared"}
        forged = jwt.encode({"sub": "x"}, "secret" * 8, "HS256", headers=header)
        assert "no such key" in refusal(service, forged)
        assert ok(get(service, issuer.sign("k1")), 200)


def sign_as(algorithm: str, payload: dict[str, Any], public: Any, private: Any) -> str:
    """What an attacker has: the public key. Or, for other algorithms, the issuer by mistake."""
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    if algorithm in {"RS384", "PS256"}:
        return jwt.encode(payload, private, algorithm, headers={"kid": "rsa"})
    header = {"alg": algorithm, "typ": "JWT", "kid": "rsa"}
    signed = b".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=")
        for part in (header, payload)
    )
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    hashes = {"HS256": hashlib.sha256, "HS512": hashlib.sha512}
    mac = hmac.digest(pem, signed, hashes[algorithm]) if algorithm in hashes else b""
    return (signed + b"." + base64.urlsafe_b64encode(mac).rstrip(b"=")).decode()


class TestIssuer:
    def test_a_rotated_key_is_found_and_a_withdrawn_one_forgotten(
        self, service: Service, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(keys_of_issuer, "FLOOR_SECONDS", 0)
        assert get(service, issuer.sign("k1")).status_code == 200
        issuer.published.clear()
        issuer.add("k2", "RS256")
        assert get(service, issuer.sign("k2")).status_code == 200
        assert "no such key" in refusal(service, issuer.sign("k1", jti="another"))

    def test_hundreds_of_unknown_keys_ask_the_issuer_once(
        self, service: Service, issuer: Issuer
    ) -> None:
        for number in range(300):
            refusal(service, issuer.sign("k1", header={"kid": f"unknown-{number}"}))
        assert len(issuer.asked) == 2  # its configuration, and its keys
        assert get(service, issuer.sign("k1")).status_code == 200
        assert len(issuer.asked) == 2

    @pytest.mark.parametrize("trouble", ["away", "error", "another", "no keys"])
    def test_when_it_is_away_known_keys_go_on_and_others_are_told_to_come_again(
        self, service: Service, issuer: Issuer, monkeypatch: pytest.MonkeyPatch, trouble: str
    ) -> None:
        assert get(service, issuer.sign("k1")).status_code == 200
        monkeypatch.setattr(keys_of_issuer, "FLOOR_SECONDS", 0)
        match trouble:
            case "away":
                issuer.stop()
            case "error":
                issuer.status = 500
            case "another":
                issuer.calls_itself = "https://evil.example"
            case "no keys":
                issuer.published = None  # type: ignore[assignment] # as no issuer does
        assert get(service, issuer.sign("k1", jti="another")).status_code == 200
        issuer.keys["k2"] = issuer.keys["k1"]
        response = get(service, issuer.sign("k2"))
        assert ok(response, 503)["code"] == "issuer_unavailable"
        assert response.headers["retry-after"] == "5"
        assert get(service, issuer.sign("k1", jti="third")).status_code == 200

    def test_old_keys_are_looked_for_again_while_requests_go_on(
        self, service: Service, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert get(service, issuer.sign("k1")).status_code == 200
        monkeypatch.setattr(keys_of_issuer, "FLOOR_SECONDS", 0)
        monkeypatch.setattr(keys_of_issuer, "FRESH_SECONDS", 0)
        issuer.published.clear()
        number = 0
        deadline = time.monotonic() + 10
        while get(service, issuer.sign("k1", jti=str(number))).status_code == 200:
            number += 1
            assert time.monotonic() < deadline


class TestProjects:
    @pytest.mark.parametrize(
        ("claims", "project", "role"),
        [
            ({"flatlora_project": "a", "flatlora_role": "viewer"}, "a", "viewer"),
            ({"flatlora_project": ["a", "b"], "flatlora_role": ["x", "admin"]}, "a", "admin"),
            ({"groups": ["/ml/search", "x"]}, "search", "viewer"),
            ({"groups": ["/ml/search", "leads"]}, "search", "admin"),
            ({"groups": "ml-admins"}, "other", "admin"),
        ],
    )
    def test_claims_or_groups_name_project_and_role(
        self, service: Service, issuer: Issuer, claims: dict[str, Any], project: str, role: str
    ) -> None:
        none = {"flatlora_project": None, "flatlora_role": None}
        token = issuer.sign("k1", **(none | claims))
        assert ok(get(service, token), 200)["project"] == project
        may_write = service.http.post("/jobs", json=service.body, headers=bearer(token))
        assert may_write.status_code == (403 if role == "viewer" else 202)
        assert get(service, token, "/audit").status_code == (200 if role == "admin" else 403)

    @pytest.mark.parametrize(
        "claims",
        [
            {"flatlora_project": None},
            {"flatlora_role": None},
            {"flatlora_role": "root"},
            {"flatlora_project": "A B"},
            {"flatlora_project": None, "groups": ["ml"]},
            {"flatlora_project": None, "groups": {"ml-admins": True}},
        ],
    )
    def test_a_token_that_names_none_opens_none(
        self, service: Service, issuer: Issuer, claims: dict[str, Any]
    ) -> None:
        problem = ok(get(service, issuer.sign("k1", **claims)), 403)
        assert "FLATLORA_OIDC_GROUPS" in problem["hint"]

    def test_of_several_the_request_chooses(self, service: Service, issuer: Issuer) -> None:
        token = issuer.sign("k1", groups=["ml-admins"])
        for project in ("search", "other", "search"):
            answer = get(service, token, **{"Flatlora-Project": project})
            assert ok(answer, 200)["project"] == project
        problem = ok(get(service, token, **{"Flatlora-Project": "third"}), 403)
        assert "search, other" in problem["hint"]

    def test_everybody_may_have_one_and_a_claim_may_lie_within_another(
        self, tmp_path: Path, migrated_sqlite_url: str, issuer: Issuer
    ) -> None:
        settings = make_settings(
            tmp_path, migrated_sqlite_url, auth="key", oidc_issuer=issuer.url,
            oidc_audience=AUDIENCE, oidc_groups="*=everybody:viewer",
            oidc_role_claim="realm_access.roles",
        )  # fmt: skip
        for service in serve(settings):
            roles = {"realm_access": {"roles": ["uma", "admin"]}}
            token = issuer.sign("k1", flatlora_project="lab", **roles)
            assert get(service, token, "/audit").status_code == 200
            plain = issuer.sign("k1", flatlora_project=None)
            assert ok(get(service, plain), 200)["project"] == "everybody"

    def test_the_audit_log_says_who(self, service: Service, issuer: Issuer) -> None:
        known: list[dict[str, Any]] = [
            {"email": "ada@example.org", "name": "Ada"}, {"name": "A\nda\x1b[31m"}, {},
        ]  # fmt: skip
        for claims in known:
            token = issuer.sign("k1", **claims)
            ok(service.http.post("/jobs", json=service.body, headers=bearer(token)), 202)
        actors = [actor for _, actor, _, _ in audited(service)]
        assert actors == ["oidc:u-1 (ada@example.org)", "oidc:u-1 (Ada[31m)", "oidc:u-1"]


class TestSettings:
    @pytest.mark.parametrize(
        ("values", "words"),
        [
            ({"oidc_issuer": "http://login.example", "oidc_audience": "x"}, "expected https"),
            ({"oidc_issuer": "login.example", "oidc_audience": "x"}, "expected https"),
            ({"oidc_issuer": "https://login.example"}, "another service"),
            ({"oidc_groups": "a=b"}, "group=project:role"),
            ({"oidc_groups": "a=b:root"}, "group=project:role"),
            ({"oidc_groups": "a=B C:admin"}, "group=project:role"),
        ],
    )
    def test_what_would_not_be_safe_is_refused_at_the_start(
        self, values: dict[str, str], words: str
    ) -> None:
        with pytest.raises(ValidationError, match=words):
            Settings.model_validate(values)

    def test_without_an_issuer_a_token_is_a_wrong_key(
        self, tmp_path: Path, migrated_sqlite_url: str, issuer: Issuer
    ) -> None:
        settings = make_settings(tmp_path, migrated_sqlite_url, auth="key")
        with TestClient(create_app(settings), base_url="http://localhost") as http:
            answer = http.get("/quota", headers=bearer(issuer.sign("k1")))
        assert ok(answer, 401)["detail"].startswith("This is not a key")
        assert issuer.asked == []


def test_the_operator_needs_no_issuer(service: Service, issuer: Issuer) -> None:
    issuer.status = 500
    assert service.http.get("/quota", headers=operator(service)).status_code == 200
