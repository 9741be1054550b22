// Answers questions about Stellar's formats with the SDK for JavaScript: one JSON document in, one out.
import { readFileSync } from "node:fs";
import { Asset, Keypair, TransactionBuilder, hash, xdr } from "@stellar/stellar-sdk";

const hex = (bytes) => Buffer.from(bytes).toString("hex");
function transaction(text, passphrase) {
  const decoded = TransactionBuilder.fromXDR(text, passphrase);
  const inner = decoded.innerTransaction ?? decoded;
  return {
    hash: hex(decoded.hash()),
    inner_hash: hex(inner.hash()),
    source: inner.source,
    fee_source: decoded.feeSource ?? inner.source,
    fee: decoded.fee,
    sequence: inner.sequence,
    operations: inner.operations.map((operation) => operation.type),
    memo: inner.memo.type,
    max_time: inner.timeBounds?.maxTime ?? null,
    again: decoded.toXDR(),
  };
}

const answers = {
  signed: ({ text, passphrase, address }) => {
    const decoded = TransactionBuilder.fromXDR(text, passphrase);
    const key = Keypair.fromPublicKey(address);
    return decoded.signatures.some((each) => key.verify(decoded.hash(), each.signature));
  },
  transaction: ({ text, passphrase }) => transaction(text, passphrase),
  again: ({ type, text }) => xdr[type].fromXDR(text, "base64").toXDR("base64"),
  contract_of_asset: ({ code, issuer, passphrase }) => (code ? new Asset(code, issuer) : Asset.native()).contractId(passphrase),
  sha256: ({ text }) => hex(hash(Buffer.from(text, "base64"))),
};

const questions = JSON.parse(readFileSync(0, "utf8"));
process.stdout.write(JSON.stringify(questions.map(({ ask, ...rest }) => answers[ask](rest))));
